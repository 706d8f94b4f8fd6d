"""How good an answer is: `recovery` for sparse codes, `image` for pictures."""

from .image import Aligned as Aligned
from .image import align as align
from .image import error_ratio as error_ratio
from .image import psnr as psnr
from .image import ssim as ssim
from .recovery import RecoveryReport as RecoveryReport
from .recovery import fraction_recovered as fraction_recovered
from .recovery import nmse_db as nmse_db
from .recovery import per_sample_nmse_db as per_sample_nmse_db
from .recovery import recovery_report as recovery_report
from .recovery import sample_nmse_db as sample_nmse_db
