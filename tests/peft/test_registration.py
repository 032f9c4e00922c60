"""PEFT knows the method like its own."""

import copy
import pickle

import pytest

pytestmark = pytest.mark.matrix


def test_the_enumeration_member_behaves_like_the_others() -> None:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from smoa_serve.peft import SMoAConfig, SMoAModel

    member = PeftType("SMOA")
    assert member is PeftType.SMOA is PeftType["SMOA"]
    assert member in list(PeftType)
    assert (member, member.value, member.name) == ("SMOA", "SMOA", "SMOA")
    assert copy.deepcopy(member) is member is pickle.loads(pickle.dumps(member))
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SMOA"] is SMoAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is SMoAModel
    assert SMoAConfig().peft_type is member
    assert PeftType.LORA.value == "LORA"


def test_registering_again_changes_nothing() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from smoa_serve.peft.registration import register

    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register()
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING
