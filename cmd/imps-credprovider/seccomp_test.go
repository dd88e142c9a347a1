//go:build linux && (amd64 || arm64)

package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// forbidden are the system calls that open a socket, or change something in a file system.
var forbidden = []uintptr{
	unix.SYS_SOCKET, unix.SYS_SOCKETPAIR, unix.SYS_CONNECT, unix.SYS_BIND, unix.SYS_SENDTO, unix.SYS_SENDMSG, unix.SYS_IO_URING_SETUP,
	unix.SYS_OPENAT2, unix.SYS_MKDIRAT, unix.SYS_MKNODAT, unix.SYS_UNLINKAT, unix.SYS_LINKAT, unix.SYS_SYMLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2,
	unix.SYS_TRUNCATE, unix.SYS_FTRUNCATE, unix.SYS_FALLOCATE, unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHOWN, unix.SYS_FCHOWNAT, unix.SYS_UTIMENSAT,
	unix.SYS_SETXATTR, unix.SYS_FSETXATTR, unix.SYS_MEMFD_CREATE,
}

// forbid has the kernel kill this thread's process, and what it becomes, when it makes one of these calls, or opens a file other
// than to read it.
func forbid(calls []uintptr) error {
	arch := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]
	const (
		load = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		is   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		has  = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		give = unix.BPF_RET | unix.BPF_K
		// Offsets in struct seccomp_data (seccomp(2)).
		number, architecture, third = 0, 4, 16 + 2*8
	)
	kill := unix.SockFilter{Code: give, K: unix.SECCOMP_RET_KILL_PROCESS}
	filter := []unix.SockFilter{{Code: load, K: architecture}, {Code: is, K: arch, Jt: 1}, kill, {Code: load, K: number}}
	for _, call := range calls {
		filter = append(filter, unix.SockFilter{Code: is, K: uint32(call), Jf: 1}, kill)
	}
	filter = append(filter,
		unix.SockFilter{Code: is, K: unix.SYS_OPENAT, Jf: 3},
		unix.SockFilter{Code: load, K: third},
		unix.SockFilter{Code: has, K: unix.O_WRONLY | unix.O_RDWR | unix.O_CREAT | unix.O_TRUNC, Jf: 1}, kill,
		unix.SockFilter{Code: give, K: unix.SECCOMP_RET_ALLOW})
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if _, _, err := syscall.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); err != 0 {
		return err
	}
	return nil
}

const under = "IMPS_TEST_UNDER_SECCOMP"

// A hit opens no socket and writes no file, and neither does a miss: the kernel would kill the provider.
func TestNoSocketIsOpenedAndNoFileWritten(t *testing.T) {
	if what := os.Getenv(under); what != "" {
		runtime.LockOSThread()
		require.NoError(t, forbid(forbidden))
		switch binary, isExec := strings.CutPrefix(what, "exec "); {
		case isExec:
			require.NoError(t, syscall.Exec(binary, append([]string{binary}, os.Args[3:]...), []string{}))
		case what == "socket":
			_, _ = syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
		case what == "write":
			_ = os.WriteFile(os.DevNull, nil, 0o600)
		}
		os.Exit(0) //nolint:forbidigo // it is a process of its own
	}
	t.Parallel()
	binary := filepath.Join(t.TempDir(), "provider")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	dir, _ := cache(t)
	start := func(what, stdin string) (string, error) {
		command := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestNoSocketIsOpenedAndNoFileWritten$", "--", "--cache-dir="+dir)
		command.Env = append(os.Environ(), under+"="+what)
		command.Stdin = strings.NewReader(stdin)
		var stdout bytes.Buffer
		command.Stdout = &stdout
		err := command.Run()
		return stdout.String(), err
	}
	for _, what := range []string{"socket", "write"} {
		_, err := start(what, "")
		var exit *exec.ExitError
		require.True(t, errors.As(err, &exit), "%s: %v", what, err)
		require.Equal(t, syscall.SIGSYS, exit.Sys().(syscall.WaitStatus).Signal(), "it can fail: %s", what)
	}
	for name, c := range map[string]struct{ request, want string }{
		"a hit of the node":        {asks("r.one/app", ""), "of the node"},
		"a hit of a namespace":     {asks("r.one/app", tokenOf()), "of a"},
		"a miss of a namespace":    {asks("r.one/app", tokenFor("c")), miss},
		"a namespace that waits":   {asks("r.one/app", tokenFor("unknown")), miss},
		"a miss of another's host": {asks("r.three/app", ""), miss},
	} {
		stdout, err := start("exec "+binary, c.request)
		require.NoError(t, err, name)
		require.Contains(t, stdout, c.want, name)
	}
}
