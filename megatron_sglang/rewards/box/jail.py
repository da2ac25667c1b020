"""From an ordinary process to the first process of an empty world: no network, no other process, no file but Python's.

Works for root and, where unprivileged user namespaces are allowed, for anybody; needs no helper program. Only for a
single-threaded process that has already imported what it will need.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
from collections.abc import Callable
from typing import NoReturn

NOBODY = 65534
GUARD_POLL_S, GUARD_GRACE_S = 0.5, 3.0
_libc = ctypes.CDLL(None, use_errno=True)

_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 1 << 12, 1 << 14, 1 << 18
_DETACH = 2
PDEATHSIG, DUMPABLE, SECCOMP, CAPBSET_DROP, SUBREAPER, NO_NEW_PRIVS = 1, 4, 22, 24, 36, 38
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_ZEROS = (ctypes.c_ulong(0), ctypes.c_ulong(0))
_CAPABILITY_VERSION_3 = 0x20080522


class JailError(Exception):
    """A step towards the jail was refused; the message names it and the kernel's reason."""


def unshare(control: socket.socket) -> None:
    """Continue as process 1 of new namespaces; the calling process stays outside as `guard`."""
    uid, gid = os.geteuid(), os.getegid()  # nobody's, once in the new namespace
    here, there = os.pipe()
    writer = _fork_map_writer(os.getpid(), here, there) if uid == 0 else None
    _step("unshare the user namespace", os.unshare, os.CLONE_NEWUSER)
    os.close(here)
    os.close(there)  # tells the writer to go on
    if writer is None or os.waitpid(writer, 0)[1] != 0:
        _map_only_self(uid, gid)
    flags = os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    _step("unshare mount, pid, net, ipc, uts and cgroup namespaces", os.unshare, flags | os.CLONE_NEWCGROUP)
    fork_under_guard(control)


def fork_under_guard(control: socket.socket) -> None:
    """Continue in a child that dies with its guard, which ends when it, or the guard's parent, does."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    child = os.fork()
    if child:
        control.close()
        _guard(child, parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    prctl(PDEATHSIG, signal.SIGKILL)


def _guard(child: int, parent: int) -> NoReturn:
    ended = None
    while ended is None and os.getppid() == parent:
        ended = signal.sigtimedwait([signal.SIGCHLD], GUARD_POLL_S)
    if ended is None:  # it tidies up and ends by itself when nobody is at the other end of its socket
        signal.sigtimedwait([signal.SIGCHLD], GUARD_GRACE_S)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def _fork_map_writer(target: int, ready: int, unused: int) -> int:
    """A helper in the old user namespace: only from there may root and nobody both be mapped."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.close(unused)
        os.read(ready, 1)
        for name in ("uid_map", "gid_map"):
            _write(f"/proc/{target}/{name}", f"0 0 1\n{NOBODY} {NOBODY} 1\n")
    except OSError:
        os._exit(1)
    os._exit(0)


def _map_only_self(uid: int, gid: int) -> None:
    _step("deny setgroups", _write, "/proc/self/setgroups", "deny")
    _step("map the user", _write, "/proc/self/uid_map", f"{NOBODY} {uid} 1\n")
    _step("map the group", _write, "/proc/self/gid_map", f"{NOBODY} {gid} 1\n")


def build_root(visible: list[str], tmp_mb: int, *, proc: bool = False) -> None:
    """Make the `visible` folders, read-only, and an empty /tmp of `tmp_mb` MB all there is.

    There is no /sys and no /dev; /proc, which then shows the new namespace's processes, only on demand. Packages
    installed below a visible folder stay hidden.
    """
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    _call("pivot_root", _libc.pivot_root, b"/tmp", b"/tmp/old")
    os.chdir("/")
    os.mkdir("/tmp")
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV | _NOEXEC, f"size={tmp_mb}m,nr_inodes=4096,mode=1777")
    for path in visible:
        os.makedirs(path, exist_ok=True)
        _mount("/old" + path, path, "", _BIND | _REC)
        _make_readonly(path)
        for packages in (f"{path}/site-packages", f"{path}/dist-packages"):
            if os.path.isdir(packages):
                _mount("tmpfs", packages, "tmpfs", _RDONLY | _NOSUID | _NODEV, "size=4k")
    if proc:
        os.mkdir("/proc")
        _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    _call("detach the old root", _libc.umount2, b"/old", _DETACH)
    os.rmdir("/old")
    _mount("none", "/", "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _make_readonly(path: str) -> None:
    attributes = struct.pack("=QQQQ", _RDONLY | _NOSUID | _NODEV, 0, 0, 0)
    number, where = ctypes.c_long(_MOUNT_SETATTR), path.encode()
    if _libc.syscall(number, _AT_FDCWD, where, _AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes))) == 0:
        return
    inherited = os.statvfs(path).f_flag & (_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME | os.ST_RELATIME)  # Linux < 5.12
    _mount("none", path, "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | _mount_flags(inherited))


def _mount_flags(flags: int) -> int:
    relatime = 1 << 21 if flags & os.ST_RELATIME else 0
    return flags & ~os.ST_RELATIME | relatime


def drop_privileges() -> None:
    """Become nobody, for ever: no capability now or through any later program, and no tracing by siblings."""
    for capability in range(64):
        if _libc.prctl(CAPBSET_DROP, ctypes.c_ulong(capability), *_ZEROS, *_ZEROS[:1]) != 0:
            break
    become_nobody()
    header, nothing = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
    _call("drop capabilities", _libc.capset, header, nothing)
    prctl(NO_NEW_PRIVS, 1)
    prctl(DUMPABLE, 0)
    prctl(PDEATHSIG, signal.SIGKILL)  # the kernel forgets it with the user


def become_nobody() -> None:
    """Give up root's user and groups; nothing to do for anybody else."""
    if os.geteuid() == 0:
        _step("drop groups", os.setgroups, [])
        _step("become nobody's group", os.setresgid, NOBODY, NOBODY, NOBODY)
        _step("become nobody", os.setresuid, NOBODY, NOBODY, NOBODY)


def prctl(option: int, value: int, pointer: int = 0) -> None:
    """prctl(2); `JailError` if refused."""
    _call(f"prctl {option}", _libc.prctl, option, ctypes.c_ulong(value), ctypes.c_void_p(pointer), *_ZEROS)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None)
    _call(f"mount {kind or source} on {target}", _libc.mount, *arguments)


def _call(what: str, function: Callable[..., int], *arguments: object) -> None:
    if function(*arguments) != 0:
        raise JailError(f"{what}: {os.strerror(ctypes.get_errno())}")


def _step(what: str, function: Callable[..., object], *arguments: object) -> None:
    try:
        function(*arguments)
    except OSError as error:
        raise JailError(f"{what}: {error.strerror}") from None


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
