# SPDX-License-Identifier: Apache-2.0
"""`python -m llm2clip_hf` is the command `llm2clip`."""

import sys

from .cli.main import main


sys.exit(main())
