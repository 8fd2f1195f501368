"""`python -m longgrpo` is `longgrpo`: what torchrun starts on each rank."""

import sys

from longgrpo.cli import main

sys.exit(main())
