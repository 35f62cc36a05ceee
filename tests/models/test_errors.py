"""How a command ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import InputError, run_command


def test_bad_input_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise InputError("a: wrong\n  b")

    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    assert capsys.readouterr().err == "error: a: wrong b\n"


def test_a_reader_that_has_gone_ends_a_command_quietly() -> None:
    program = "from models.errors import run_command; run_command(lambda: print('x' * 10**6) or 0)"
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_another_broken_pipe_is_a_fault_with_its_traceback() -> None:
    program = (
        "import os; from models.errors import run_command; r, w = os.pipe(); os.close(r);"
        " run_command(lambda: os.write(w, b'x'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


@pytest.mark.parametrize("number", (errno.EACCES, errno.ENOSPC, errno.ENOENT))
def test_a_file_that_the_system_refuses_is_one_line(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise OSError(number, os.strerror(number), "some/file")

    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    assert capsys.readouterr().err == f"error: some/file: {os.strerror(number)}\n"


def test_a_full_standard_output_is_one_line() -> None:
    program = "from models.errors import run_command; run_command(lambda: print('x' * 10**6) or 0)"
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def test_a_connection_that_fails_is_a_fault_of_ours() -> None:
    def main() -> int:
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    with pytest.raises(ConnectionResetError):
        run_command(main)
