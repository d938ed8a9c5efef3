"""A trained model on disk: what it is (`bundle.json`), its weights (`checkpoints/*.safetensors`), and who vouches for
both (`manifest.json`).

Everything is JSON or safetensors: opening a stranger's model builds registered parts by name and never runs code. A
bundle is what `medseg export` makes of a run, as a zip or a folder: only what prediction needs, each file listed with
its size and SHA-256, which are checked before anything is read from it.
"""

from medseg.bundle.archive import is_archive, is_bundle, opened
from medseg.bundle.checkpoint import (
    CHECKPOINT_FOLDER,
    MODEL_PREFIX,
    checkpoint_path,
    load_weights,
    read_checkpoint,
    write_atomically,
    write_checkpoint,
)
from medseg.bundle.info import BUNDLE_FILE, FOLDS_FILE, Bundle, BundleInfo, load_bundle
from medseg.bundle.manifest import MANIFEST_FILE, forget_manifest, write_manifest

__all__ = [
    "BUNDLE_FILE",
    "CHECKPOINT_FOLDER",
    "FOLDS_FILE",
    "MANIFEST_FILE",
    "MODEL_PREFIX",
    "Bundle",
    "BundleInfo",
    "checkpoint_path",
    "forget_manifest",
    "is_archive",
    "is_bundle",
    "load_bundle",
    "load_weights",
    "opened",
    "read_checkpoint",
    "write_atomically",
    "write_checkpoint",
    "write_manifest",
]
