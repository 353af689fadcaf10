"""megatron-core on CPU: tiny models, and one model in Megatron's form and in the native one."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")
