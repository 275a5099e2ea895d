"""Methods: LightningModules that learn a stream; `mh_lightning.methods.base` is what they share."""

from mh_lightning.methods.alignment import ClassifierAlignment
from mh_lightning.methods.averaged_gem import AveragedGEM
from mh_lightning.methods.base import Batch, ContinualMethod, Head
from mh_lightning.methods.closed_form import ClosedForm
from mh_lightning.methods.ensemble import Ensemble
from mh_lightning.methods.experience_replay import ExperienceReplay
from mh_lightning.methods.fine_tuning import FineTuning
from mh_lightning.methods.gdumb import GDumb
from mh_lightning.methods.joint_training import JointTraining
from mh_lightning.methods.maximally_interfered_retrieval import MaximallyInterferedRetrieval
from mh_lightning.methods.slca import SLCA

__all__ = [
    "SLCA",
    "AveragedGEM",
    "Batch",
    "ClassifierAlignment",
    "ClosedForm",
    "ContinualMethod",
    "Ensemble",
    "ExperienceReplay",
    "FineTuning",
    "GDumb",
    "Head",
    "JointTraining",
    "MaximallyInterferedRetrieval",
]
