"""`mrpo completion SHELL`: the script that makes a shell complete commands, options, files and settings.

shtab writes what concerns commands and options; what an argument takes follows from its metavar. Settings
(`section.key=value`) get a function of each shell, as what may follow `=` depends on the key before it.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mrpo.commands.parser import Commands

SHELLS = ("bash", "zsh", "fish")
FILES = "FILES"  # what the shells' functions print for a value that is a path
_EPILOG = """\
for this session:
  source <(mrpo completion bash)
for every session:
  mrpo completion bash > ~/.local/share/bash-completion/completions/mrpo
  mrpo completion zsh > DIR/_mrpo    # DIR: a folder of $fpath
  mrpo completion fish > ~/.config/fish/completions/mrpo.fish"""

_BASH = """
_mrpo_settings() { compgen -S = -W "$(_mrpo_keys)" -- "$1"; }"""

# bash ends words at `=`, so that the word under the cursor is the value alone and the key must be taken from the line.
_BASH_END = """
_mrpo() {
  local word="${COMP_LINE:0:COMP_POINT}" values
  word="${word##*[[:space:]]}"
  values="$(_mrpo_values "${word%%=*}")"
  if [[ $word != *=* ]]; then
    _shtab_mrpo "$@"
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
  elif [[ $values == FILES ]]; then
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen -f -- "${word#*=}")  # a line a file, as names may hold spaces
  else
    COMPREPLY=($(compgen -W "$values" -- "${word#*=}"))
  fi
  return 0
}
complete -o bashdefault -F _mrpo mrpo"""

_ZSH = """
_mrpo_settings() {
  local key="${PREFIX%%=*}"
  if ! compset -P '*='; then
    compadd -S = -- $(_mrpo_keys)
  elif [[ "$(_mrpo_values "$key")" == FILES ]]; then
    _files
  else
    compadd -- $(_mrpo_values "$key")
  fi
}"""

_FISH = """
function _mrpo_settings
  set -l word (commandline -ct)
  set -l key (string split -m1 = -- $word)[1]
  set -l values (_mrpo_values $key)
  if not string match -q '*=*' -- $word
    printf '%s=\\n' (_mrpo_keys)
  else if test "$values" = FILES
    printf "$key=%s\\n" (__fish_complete_path (string split -m1 = -- $word)[2])
  else
    printf "$key=%s\\n" $values
  end
end"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a script that makes a shell complete mrpo's command lines",
        description="Prints a completion script: commands, options, files, settings and their values.",
        epilog=_EPILOG,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from mrpo.cli import build_parser

    print(completion_script(build_parser(), args.shell), end="")
    return 0


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that completes the command lines of `parser` in `shell`, one of SHELLS."""
    import shtab

    for action in _actions(parser):
        if action.metavar == "key=value":
            call = "_mrpo_settings"
            setattr(action, "complete", {"bash": call, "zsh": call, "fish": f"({call})"})  # noqa: B010
        elif action.metavar == "DIR":
            setattr(action, "complete", shtab.DIRECTORY)  # noqa: B010
        elif action.type is Path or action.metavar == "COMPLETIONS":
            setattr(action, "complete", shtab.FILE)  # noqa: B010
    settings = {"bash": _posix_data() + _BASH, "zsh": _posix_data() + _ZSH, "fish": _fish_data() + _FISH}
    preamble: Any = {shell: settings[shell]}
    script = shtab.complete(parser, shell, preamble=preamble)
    if shell == "zsh":
        # In shtab's form only the first of several positional arguments is completed.
        script = script.replace('"(*)::', '"*:').replace('"(*):', '"*:')
    return script + (_BASH_END if shell == "bash" else "") + "\n"


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def setting_values() -> dict[str, list[str]]:
    """Every key, and what its value can be: [FILES] for a path, nothing for free text and numbers."""
    from mrpo.help import describe_fields

    found = {}
    for field in describe_fields():
        options = field.type.split(" or ")
        words = [word for option in options for word in option.split(" | ") if option == "null" or " | " in option]
        found[field.key] = [FILES] if "path" in options or field.key.endswith(".path") else words
    return found


def _posix_data() -> str:
    """Functions that print the keys and the values of a key, as both bash and zsh read them."""
    values = setting_values()
    cases = [f"{key}) echo {' '.join(map(shlex.quote, words))} ;;" for key, words in values.items() if words]
    return "\n".join([f"_mrpo_keys() {{ echo {' '.join(values)}; }}", "_mrpo_values() { case $1 in", *cases, "esac }"])


def _fish_data() -> str:
    values = setting_values()
    cases = [f"case {key}; printf '%s\\n' {' '.join(map(shlex.quote, w))}" for key, w in values.items() if w]
    keys = f"function _mrpo_keys; printf '%s\\n' {' '.join(values)}; end"
    return "\n".join([keys, "function _mrpo_values; switch $argv[1]", *cases, "end; end"])
