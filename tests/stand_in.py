"""Importing this puts the extension module that GHOSTGRAM_EXTENSION names in the place of ghostgram._C."""

import importlib.util
import os
import sys

sys.setdlopenflags(os.RTLD_LAZY)  # kernels of other instruction sets may be missing, and are never called
spec = importlib.util.spec_from_file_location("ghostgram._C", os.environ["GHOSTGRAM_EXTENSION"])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
