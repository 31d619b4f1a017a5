# SPDX-License-Identifier: Apache-2.0
"""Named data sets, and how a model is measured on them."""
