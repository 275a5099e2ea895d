"""Methods: LightningModules that learn a stream; `mh_lightning.methods.base` is what they share."""

from mh_lightning.methods.alignment import ClassifierAlignment
from mh_lightning.methods.averaged_gem import AveragedGEM
from mh_lightning.methods.base import Batch, ContinualMethod, Head
from mh_lightning.methods.closed_form import ClosedForm
from mh_lightning.methods.coda_prompt import CODAPrompt
from mh_lightning.methods.dark_experience_replay import DER, DERPlusPlus
from mh_lightning.methods.dual_prompt import DualPrompt
from mh_lightning.methods.ease import EASE
from mh_lightning.methods.elastic_weight_consolidation import EWC
from mh_lightning.methods.ensemble import Ensemble
from mh_lightning.methods.er_ace import ERACE
from mh_lightning.methods.experience_replay import ExperienceReplay
from mh_lightning.methods.fine_tuning import FineTuning
from mh_lightning.methods.first_task_adaptation import FirstTaskAdaptation
from mh_lightning.methods.gdumb import GDumb
from mh_lightning.methods.icarl import ICaRL
from mh_lightning.methods.joint_training import JointTraining
from mh_lightning.methods.l2p import L2P
from mh_lightning.methods.learning_without_forgetting import LwF
from mh_lightning.methods.maximally_interfered_retrieval import MaximallyInterferedRetrieval
from mh_lightning.methods.slca import SLCA
from mh_lightning.methods.synaptic_intelligence import SynapticIntelligence
from mh_lightning.methods.weight_aligning import WeightAligning

__all__ = [
    "DER",
    "EASE",
    "ERACE",
    "EWC",
    "L2P",
    "SLCA",
    "AveragedGEM",
    "Batch",
    "CODAPrompt",
    "ClassifierAlignment",
    "ClosedForm",
    "ContinualMethod",
    "DERPlusPlus",
    "DualPrompt",
    "Ensemble",
    "ExperienceReplay",
    "FineTuning",
    "FirstTaskAdaptation",
    "GDumb",
    "Head",
    "ICaRL",
    "JointTraining",
    "LwF",
    "MaximallyInterferedRetrieval",
    "SynapticIntelligence",
    "WeightAligning",
]
