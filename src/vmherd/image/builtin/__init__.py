"""The built-in guest: a kernel and a small initramfs, put together from the host's Debian packages without root."""

from __future__ import annotations

from vmherd.image.builtin.build import build_builtin, default_cache_dir

__all__ = ["build_builtin", "default_cache_dir"]
