# Sourced by the other scripts: makes a virtual environment where there is none, installs the package with the extras
# that are named as the argument, and activates it. VENV names its folder, .venv by default, PYTHON the interpreter,
# python3 by default.
VENV="${VENV:-.venv}"
if [ ! -x "$VENV/bin/python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit("Python 3.10 or later is needed, this is " + sys.version.split()[0] +
        ": name another with PYTHON=python3.12") if sys.version_info < (3, 10) else None'
    "${PYTHON:-python3}" -m venv "$VENV"
fi
. "$VENV/bin/activate"
echo "Installing timm_aws[$1] into $VENV (the first time some minutes, mostly torch) ..."
python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
