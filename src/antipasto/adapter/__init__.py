"""The adapter as a PEFT method, registered with PEFT on import. The only room that imports PEFT's internals."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import PEFT_TYPE, TARGET_MODULES, AntiPastoConfig
from .experts import AntiPastoExperts
from .layer import AntiPastoLinear, View
from .model import AntiPastoModel

# peft.utils.register_peft_method does the same, but accepts only methods that PEFT itself lists
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = AntiPastoConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = AntiPastoModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = AntiPastoModel.prefix

__all__ = ["TARGET_MODULES", "AntiPastoConfig", "AntiPastoExperts", "AntiPastoLinear", "AntiPastoModel", "View"]
