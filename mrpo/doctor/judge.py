"""The judge that a configuration names: whether it answers, takes the key, and knows the model."""

from __future__ import annotations

import asyncio
import os
from urllib.parse import urlsplit

import openai

from mrpo.config import Config, JudgeConfig
from mrpo.doctor.check import Check
from mrpo.judge.endpoint import base_url_of, is_openai

PATIENCE = 5.0  # seconds until an endpoint that says nothing counts as unreachable


def check_judge(config: Config) -> Check:
    """The judge of the steps: embedded, or an endpoint that must answer and know the model."""
    if not config.generates:
        return Check("judge", "ok", "none: the run generates no completions")
    if config.judge.kind == "openai":
        return asyncio.run(_check_endpoint(config.judge))
    if config.algorithm == "sft" or config.data.name == "phantom":
        return Check("judge", "ok", "embedded")
    encoder = config.judge.encoder
    if encoder is not None and not (encoder / "config.json").is_file():
        fact = f"judge.encoder={encoder} holds no config.json, so no sentence encoder"
        return Check("judge", "missing", fact, "judge.encoder=FOLDER of a sentence encoder, or null")
    compared = "words" if encoder is None else "words and sentences"
    fact = f"embedded: on {config.data.name} it compares {compared} and is no medical judge"
    return Check("judge", "warning", fact, "judge.kind=openai judge.base_url=URL judge.model=NAME")


async def _check_endpoint(judge: JudgeConfig) -> Check:
    key, set_key = os.environ.get(judge.api_key_env, ""), f"export {judge.api_key_env}=KEY"
    base_url = base_url_of(judge)
    if not key and is_openai(base_url):
        fact = f"{judge.model} at OpenAI needs a key, and {judge.api_key_env} is not set"
        return Check("judge", "missing", fact, set_key)
    place = _without_secrets(base_url) if base_url else "OpenAI"
    reach = "judge.base_url=URL of an endpoint that runs, as `vllm serve MODEL` starts one"
    try:
        models = await asyncio.wait_for(_list_models(base_url, key or "EMPTY"), 2 * PATIENCE)
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        told = "refuses the key in" if key else "wants a key, and there is none in"
        return Check("judge", "missing", f"{place} {told} {judge.api_key_env} ({error.status_code})", set_key)
    except openai.APIStatusError as error:
        fact = f"{place} answers with status {error.status_code} when asked for its models"
        return Check("judge", "warning", fact, "judge.base_url=URL, which usually ends with /v1")
    except (openai.APIConnectionError, TimeoutError) as error:
        cause = error.__cause__ or error
        return Check("judge", "missing", f"{place} cannot be reached: {type(cause).__name__}", reach)
    except (openai.OpenAIError, ValueError, TypeError, AttributeError, OSError) as error:
        return Check("judge", "missing", f"{place} is no OpenAI-compatible endpoint: {type(error).__name__}", reach)
    if judge.model not in models:
        known = ", ".join(models[:5]) or "none"
        return Check("judge", "warning", f"{place} does not list {judge.model}; it lists {known}", "judge.model=NAME")
    return Check("judge", "ok", f"{judge.model} at {place}")


async def _list_models(base_url: str | None, key: str) -> list[str]:
    async with openai.AsyncOpenAI(api_key=key, base_url=base_url, timeout=PATIENCE, max_retries=0) as client:
        return [str(model.id) for model in (await client.models.list()).data]


def _without_secrets(url: str) -> str:
    """`url` without user name, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
