#!/bin/sh
# SGLang's interpreter without the variables by which the base image leads Python and the loader to its own libraries.
# The driver's libraries for CUDA stay, which the base puts there where the host's driver is older.
unset PYTHONPATH PYTHONHOME PIP_CONSTRAINT
export LD_LIBRARY_PATH=/usr/local/cuda/compat/lib:/usr/local/nvidia/lib64
exec /opt/sglang/bin/python "$@"
