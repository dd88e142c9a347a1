package nodecache

import (
	"os"
	"path/filepath"
	"syscall"
)

// Commands of fcntl(2) for locks of open file descriptions, which end with the process however it ends.
const (
	ofdGetLock = 36
	ofdSetLock = 37
)

// setLock takes the whole file, or fails at once.
func setLock(fd uintptr) error {
	return syscall.FcntlFlock(fd, ofdSetLock, &syscall.Flock_t{Type: syscall.F_WRLCK})
}

// endLock gives the file up at once: a process that is being forked has it open, too, until it becomes another program.
func endLock(fd uintptr) error {
	return syscall.FcntlFlock(fd, ofdSetLock, &syscall.Flock_t{Type: syscall.F_UNLCK})
}

// Alive reports whether a Writer has the folder open.
func Alive(dir string) bool {
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0) //nolint:gosec // the folder is its caller's
	if err != nil {
		return false
	}
	defer func() { _ = f.Close() }()
	lock := syscall.Flock_t{Type: syscall.F_RDLCK} // would that be refused?
	return syscall.FcntlFlock(f.Fd(), ofdGetLock, &lock) == nil && lock.Type != syscall.F_UNLCK
}
