"""Where adapters come from: `fetch(uri, policy, cache)` gives a folder of adapter files, whatever the URI's scheme.

| URI | read by | credentials and endpoint |
|---|---|---|
| a path, `file:///…` | `local`, below a configured root | none |
| `hf://org/repo[@revision][/subfolder]` | huggingface_hub, then `http` | `HF_TOKEN`, `HF_ENDPOINT` |
| `s3://`, `gs://`, `az://` a folder, a `.tar`, a `.zip` | s3fs, gcsfs, adlfs (extras) | as those read them |
| `https://` a folder, a `.tar`, a `.zip` | `http` | `~/.netrc` or `NETRC`, `SSL_CERT_FILE` |

Nothing remote is allowed until a prefix of `SourcePolicy.allow` names it. Only adapter files are fetched, into a cache
that is bounded and holds whole entries alone. What may work later is a `SourceUnavailableError`; every other error is
lasting: `AdapterNotFoundError`, `PathNotAllowedError`, `AdapterError`, `ConfigError`, `StorageError`.
"""

from .cache import Cache
from .fetching import Fetched, fetch
from .policy import SourcePolicy
from .template import check_template, match_template
from .watch import FolderEvent, watch

__all__ = ["Cache", "Fetched", "FolderEvent", "SourcePolicy", "check_template", "fetch", "match_template", "watch"]
