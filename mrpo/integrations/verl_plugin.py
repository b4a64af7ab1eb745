"""Imported by verl in each of its processes when VERL_USE_EXTERNAL_MODULES names it: registers the estimator `mrpo`."""

from __future__ import annotations

from mrpo.integrations.verl import register

register()
