"""`python -m timm_aws`: what `timm-aws` is, in the spelling that `torchrun -m` takes.

Python imports the package, and torch with it, before this file: even the help takes seconds.
"""
from timm_aws_cli import main

if __name__ == '__main__':
    main()
