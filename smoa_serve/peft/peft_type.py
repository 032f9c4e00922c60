"""A member of PEFT's own enumeration of methods for SMoA."""

from peft.utils.peft_types import PeftType


def _smoa_member() -> PeftType:
    """`PeftType.SMOA`, made if PEFT has none.

    `register_peft_method` accepts only members of PeftType, and PEFT has no way to add one. A plain string in its
    mappings is not enough: PEFT 0.19 saves only what is `in list(PeftType)`, and messages read `.value`.
    """
    if "SMOA" in PeftType.__members__:
        return PeftType["SMOA"]
    member = str.__new__(PeftType, "SMOA")
    member._name_ = "SMOA"
    member._value_ = "SMOA"
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    # Attribute first: an Enum refuses to set a name that is already in its member map.
    PeftType.SMOA = member
    PeftType._member_names_.append("SMOA")
    PeftType._member_map_["SMOA"] = member
    PeftType._value2member_map_["SMOA"] = member
    return member


SMOA = _smoa_member()
