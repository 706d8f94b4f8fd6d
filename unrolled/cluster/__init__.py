"""Clustering: k-means as a layer, as an unrolled loop, and with an encoder that learns."""

from .annealing import AnnealTemperature as AnnealTemperature
from .kmeans import Clusters as Clusters
from .kmeans import KMeansHead as KMeansHead
from .lloyd import KMeans as KMeans
from .lloyd import KMeansStep as KMeansStep
from .restarts import Found as Found
from .restarts import fit_centres as fit_centres
from .starts import DataPoints as DataPoints
from .starts import KMeansPlusPlus as KMeansPlusPlus
