# Sourced by the other scripts: makes .venv where there is none, installs the package with the extras that are named
# as the argument, and activates it. PYTHON names the interpreter, python3 by default.
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit("Python 3.10 or later is needed, this is " + sys.version.split()[0] +
        ": name another with PYTHON=python3.12") if sys.version_info < (3, 10) else None'
    "${PYTHON:-python3}" -m venv .venv
fi
. .venv/bin/activate
echo "Installing timm_aws[$1] into .venv (the first time some minutes, mostly torch) ..."
python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
