# SPDX-License-Identifier: Apache-2.0
"""The caption-embedding store: reader, writer, embedding, text encoders and fingerprint."""
