"""The system call filter, interpreted: what each machine's program allows, checked by names against its table."""

from __future__ import annotations

import struct

import pytest

from megatron_sglang.rewards.box import seccomp

ALLOW, DENY, NO_SUCH_CALL, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# name: number on x86_64, on aarch64
DANGEROUS = {
    **{"socket": (41, 198), "connect": (42, 203), "fork": (57, None), "vfork": (58, None), "execve": (59, 221)},
    **{"kill": (62, 129), "tgkill": (234, 131), "ptrace": (101, 117), "mount": (165, 40), "umount2": (166, 39)},
    **{"unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "keyctl": (250, 219), "shmget": (29, 194)},
    **{"io_uring_setup": (425, 425), "userfaultfd": (323, 282), "perf_event_open": (298, 241)},
    **{"memfd_create": (319, 279), "process_vm_writev": (311, 271), "pidfd_send_signal": (424, 424)},
    **{"prctl": (157, 167), "seccomp": (317, 277), "pivot_root": (155, 41), "chroot": (161, 51)},
}


def run(machine: str, number: int, argument: int = 0, architecture: int | None = None) -> int:
    """Interpret the program on one call, as the kernel does."""
    code = [struct.unpack("=HBBI", part) for part in _eights(seccomp.program(machine))]
    data = {0: number, 4: architecture or ARCHITECTURES[machine], 16: argument}
    at = register = 0
    while True:
        operation, if_true, if_false, k = code[at]
        at += 1
        if operation == 0x06:
            return k
        if operation == 0x20:
            register = data[k]
        else:
            at += (
                if_true if {0x15: register == k, 0x35: register >= k, 0x45: bool(register & k)}[operation] else if_false
            )


def _eights(program: bytes) -> list[bytes]:
    return [program[i : i + 8] for i in range(0, len(program), 8)]


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_exactly_the_listed_calls_are_allowed(machine):
    column = 1 + list(ARCHITECTURES).index(machine)
    rows = [row.split() for row in seccomp._ALLOWED.replace("\n", ";").split(";") if row.strip()]
    listed = {int(row[column]) for row in rows if row[column] != "-"}
    prlimit = {"x86_64": 302, "aarch64": 261}[machine]
    assert {number for number in range(600) if run(machine, number) == ALLOW} == listed | {prlimit}


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("name", DANGEROUS)
def test_dangerous_calls_are_denied(machine, name):
    number = DANGEROUS[name][list(ARCHITECTURES).index(machine)]
    assert number is None or run(machine, number) == DENY


@pytest.mark.parametrize(("machine", "clone", "prlimit"), [("x86_64", 56, 302), ("aarch64", 220, 261)])
def test_threads_but_no_processes_and_own_limits_only(machine, clone, prlimit):
    assert run(machine, clone, 0x10F00) == ALLOW, "CLONE_VM | CLONE_THREAD | ..."
    assert run(machine, clone, 17) == DENY, "SIGCHLD alone: a fork"
    assert run(machine, 435) == NO_SUCH_CALL, "clone3, whose flags a filter cannot see"
    assert run(machine, prlimit, 0) == ALLOW
    assert run(machine, prlimit, 1) == DENY


def test_calls_of_another_architecture_are_fatal_and_x32_is_denied():
    assert run("x86_64", 1, architecture=0x40000003) == KILL, "i386, where 1 is exit and 11 is execve"
    assert run("x86_64", 0x40000000 | 1) == DENY
