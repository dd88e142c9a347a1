package cluster

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

const (
	dataPrefix = "imps-cluster-"
	// lockName is the file that the owner of a data folder holds locked while
	// it lives; the kernel drops the lock however the owner ends.
	lockName = "lock"
	keepName = "keep"
)

// dataDir is a temporary folder that belongs to one running cluster.
type dataDir struct {
	root string
	keep bool
	lock *os.File
}

func newDataDir(keep bool) (*dataDir, error) {
	root, err := os.MkdirTemp("", dataPrefix+"*")
	if err != nil {
		return nil, err
	}
	d := &dataDir{root: root, keep: keep}
	if keep {
		if err := os.WriteFile(d.path(keepName), nil, 0o600); err != nil {
			return nil, errors.Join(err, os.RemoveAll(root))
		}
	}
	// Locked before it gets its name, so that a sweep never finds it unlocked.
	fresh := d.path(lockName + ".new")
	if d.lock, err = lockFile(fresh); err == nil {
		err = os.Rename(fresh, d.path(lockName))
	}
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

func (d *dataDir) path(name string) string {
	return filepath.Join(d.root, name)
}

// close removes the folder, unless it is to be kept, and gives up the lock.
func (d *dataDir) close() error {
	var errs []error
	if !d.keep {
		errs = append(errs, os.RemoveAll(d.root))
	}
	if d.lock != nil {
		errs = append(errs, d.lock.Close())
	}
	return errors.Join(errs...)
}

// sweep removes the data folders of owners that are dead. What it cannot
// remove, such as a folder of another user, it leaves: the next sweep tries
// again, and no start may fail for it.
func sweep(parent string) {
	dirs, err := filepath.Glob(filepath.Join(parent, dataPrefix+"*"))
	if err != nil {
		return
	}
	for _, dir := range dirs {
		if _, err := os.Stat(filepath.Join(dir, keepName)); err == nil {
			continue
		}
		info, err := os.Lstat(dir)
		if err != nil || !info.IsDir() {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, lockName)); errors.Is(err, fs.ErrNotExist) {
			// Its owner may be about to lock it.
			if time.Since(info.ModTime()) > time.Minute {
				_ = os.RemoveAll(dir)
			}
			continue
		}
		lock, err := lockFile(filepath.Join(dir, lockName))
		if err != nil {
			continue
		}
		if removeCgroups(filepath.Base(dir)+".*") == nil { // those of its nodes
			_ = os.RemoveAll(dir)
		}
		_ = lock.Close()
	}
}

// errLocked says that someone else holds a lock.
var errLocked = errors.New("locked by another process")

// lockFile opens a file, creating it where it is missing, and locks it without
// waiting. Closing it, or the end of the process, unlocks it. Children do not
// inherit it.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600) //nolint:gosec // a lock in the cache or in a data folder
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = errLocked
		}
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f, nil
}

// freePort returns a loopback port below the range from which the kernel takes
// the ports of outgoing connections: one of those could sit on the API
// server's port while it is down, even a client's own attempt to reach it.
func freePort(ctx context.Context) (int, error) {
	const first = 10_000
	end := 32_768
	if text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		if _, err := fmt.Sscan(string(text), &end); err != nil {
			return 0, fmt.Errorf("read the range of outgoing ports: %w", err)
		}
	}
	end = max(end, first+1_000)
	var last error
	for range 100 {
		offset, err := rand.Int(rand.Reader, big.NewInt(int64(end-first)))
		if err != nil {
			return 0, fmt.Errorf("choose a port: %w", err)
		}
		port := first + int(offset.Int64())
		listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			last = err
			continue
		}
		if err := listener.Close(); err != nil {
			return 0, fmt.Errorf("free port %d again: %w", port, err)
		}
		return port, nil
	}
	return 0, fmt.Errorf("find a free loopback port: %w", last)
}
