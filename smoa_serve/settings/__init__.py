"""One tree of settings: what the command line, the environment and a YAML file say, for every process of a server."""

from .sources import load_settings, process_settings
from .tree import FIELDS, OTHER_VARIABLES, SECTIONS, TREE_VARIABLE, Declared, MergePolicy, OthersGet, Settings

__all__ = ["FIELDS", "OTHER_VARIABLES", "SECTIONS", "TREE_VARIABLE", "Declared", "MergePolicy"]
__all__ += ["OthersGet", "Settings", "load_settings", "process_settings"]
