"""An allow-list of system calls: what a computation needs, and no network, no process, no signal, no namespace.

A second wall behind the namespaces, and the main one of the tiers that have none. Threads may be started, processes
not. Anything else fails with EPERM. Without effect, and said so by `supported`, on machines other than x86_64 and
aarch64.
"""

from __future__ import annotations

import ctypes
import os
import struct

from megatron_sglang.rewards.box import jail

# name, x86_64, aarch64 ("-": does not exist there)
_ALLOWED = """
read 0 63; write 1 64; close 3 57; fstat 5 80; newfstatat 262 79; stat 4 -; lstat 6 -; statx 332 291; lseek 8 62
mmap 9 222; mprotect 10 226; munmap 11 215; mremap 25 216; madvise 28 233; brk 12 214; rt_sigaction 13 134
rt_sigprocmask 14 135; rt_sigreturn 15 139; sigaltstack 131 132; ioctl 16 29; pread64 17 67; pwrite64 18 68
readv 19 65; writev 20 66; access 21 -; faccessat 269 48; faccessat2 439 439; pipe 22 -; pipe2 293 59; select 23 -
pselect6 270 72; poll 7 -; ppoll 271 73; sched_yield 24 124; dup 32 23; dup2 33 -; dup3 292 24; nanosleep 35 101
clock_nanosleep 230 115; clock_gettime 228 113; clock_getres 229 114; gettimeofday 96 169; time 201 -; times 100 153
getrusage 98 165; getpid 39 172; gettid 186 178; getppid 110 173; getuid 102 174; geteuid 107 175; getgid 104 176
getegid 108 177; getgroups 115 158; getcwd 79 17; chdir 80 49; fcntl 72 25; fsync 74 82; fdatasync 75 83
ftruncate 77 46; getdents64 217 61; rename 82 -; renameat 264 38; renameat2 316 276; mkdir 83 -; mkdirat 258 34
rmdir 84 -; unlink 87 -; unlinkat 263 35; readlink 89 -; readlinkat 267 78; chmod 90 -; fchmod 91 52; fchmodat 268 53
umask 95 166; futex 202 98; set_robust_list 273 99; rseq 334 293; getrandom 318 278; exit 60 93; exit_group 231 94
recvfrom 45 207; sendto 44 206; recvmsg 47 212; sendmsg 46 211; shutdown 48 210; getrlimit 97 163; setrlimit 160 164
sysinfo 99 179; uname 63 160; sched_getaffinity 204 123; open 2 -; openat 257 56; restart_syscall 219 128
"""
_MACHINES = {"x86_64": (0, 0xC000003E, 56, 302), "aarch64": (1, 0xC00000B7, 220, 261)}  # column, audit, clone, prlimit
_CLONE3, _CLONE_THREAD = 435, 0x10000
_EPERM, _ENOSYS = 1, 38

Instruction = tuple[int, int, int, int]
_LOAD, _EQUAL, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_KILL: Instruction = (_RETURN, 0, 0, 0x80000000)
_ALLOW: Instruction = (_RETURN, 0, 0, 0x7FFF0000)
_DENY: Instruction = (_RETURN, 0, 0, 0x00050000 | _EPERM)
_MODE_FILTER = 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def supported() -> bool:
    """Whether this machine's system calls are known and a filter really takes effect (tried in a child)."""
    if os.uname().machine not in _MACHINES:
        return False
    child = os.fork()
    if child == 0:
        try:
            install(program(os.uname().machine))
            os.kill(os.getpid(), 0)
        except PermissionError:
            os._exit(0)
        except BaseException:  # noqa: BLE001 - a process boundary
            os._exit(1)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def program(machine: str) -> bytes:
    """The filter as BPF."""
    column, audit, clone, prlimit = _MACHINES[machine]
    numbers = (row.split()[1 + column] for row in _ALLOWED.replace("\n", ";").split(";") if row.strip())
    verdicts = {int(number): [_ALLOW] for number in numbers if number != "-"}
    verdicts[_CLONE3] = [(_RETURN, 0, 0, 0x00050000 | _ENOSYS)]  # glibc then falls back to clone
    verdicts[clone] = [(_LOAD, 0, 0, _FIRST_ARGUMENT), (_HAS_BITS, 0, 1, _CLONE_THREAD), _ALLOW, _DENY]
    verdicts[prlimit] = [(_LOAD, 0, 0, _FIRST_ARGUMENT), (_EQUAL, 0, 1, 0), _ALLOW, _DENY]  # of itself only
    for number in [-1, *verdicts]:
        verdicts.setdefault(number + 1, [_DENY])
    verdicts_by_range = [
        (number, verdict) for number, verdict in sorted(verdicts.items()) if verdicts.get(number - 1) != verdict
    ]
    head = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, audit), _KILL, (_LOAD, 0, 0, _NUMBER)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in [*head, *_search(verdicts_by_range)])


def _search(ranges: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    """Binary search for the last start <= number: the kernel walks the filter once for every number there is."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    below, above = _search(ranges[:middle]), _search(ranges[middle:])
    return [(_AT_LEAST, len(below), 0, ranges[middle][0]), *below, *above]


def install(code: bytes) -> None:
    """Put the calling thread under the filter, for ever; `JailError` if the kernel refuses."""
    jail.prctl(jail.NO_NEW_PRIVS, 1)
    filter_ = _Program(len(code) // 8, code)
    jail.prctl(jail.SECCOMP, _MODE_FILTER, ctypes.addressof(filter_))
