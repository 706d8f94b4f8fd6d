"""Clustering: k-means as a layer, as an unrolled loop, and with an encoder that learns."""

from .annealing import AnnealTemperature as AnnealTemperature
from .deep import DeepKMeans as DeepKMeans
from .deep_augmentation import RandomAffine as RandomAffine
from .deep_losses import Attraction as Attraction
from .deep_losses import Contrast as Contrast
from .deep_losses import LogLikelihood as LogLikelihood
from .encoders import Coders as Coders
from .encoders import convolutional_coders as convolutional_coders
from .encoders import fully_connected_coders as fully_connected_coders
from .kmeans import Clusters as Clusters
from .kmeans import KMeansHead as KMeansHead
from .lloyd import KMeans as KMeans
from .lloyd import KMeansStep as KMeansStep
from .restarts import Found as Found
from .restarts import fit_centres as fit_centres
from .starts import DataPoints as DataPoints
from .starts import KMeansPlusPlus as KMeansPlusPlus
