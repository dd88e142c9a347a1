package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// canIsolate says why this process cannot start a node.
func canIsolate() error {
	if os.Geteuid() != 0 {
		return errors.New("a node needs root")
	}
	return nil
}

// isolate gives the thread it runs on a mount namespace, with the private
// folders from dir in their places, and its children a PID namespace, whose
// first process is the first child. Nothing but the thread and its children
// notices.
func isolate(dir string) error {
	if err := syscall.Unshare(syscall.CLONE_NEWNS | syscall.CLONE_NEWPID); err != nil {
		return fmt.Errorf("make namespaces: %w", err)
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts to the namespace: %w", err)
	}
	for _, folder := range privateFolders() {
		if err := syscall.Mount(filepath.Join(dir, folder), folder, "", syscall.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount its own %s: %w", folder, err)
		}
	}
	return nil
}

const cgroups = "/sys/fs/cgroup"

// hierarchies returns the roots of all cgroup hierarchies, and whether they are
// those of version 1, one for each controller.
func hierarchies() (roots []string, v1 bool, err error) {
	if exists(filepath.Join(cgroups, "cgroup.controllers")) {
		return []string{cgroups}, false, nil
	}
	entries, err := os.ReadDir(cgroups)
	if err != nil {
		return nil, false, fmt.Errorf("list the cgroup hierarchies: %w", err)
	}
	for _, entry := range entries {
		if entry.IsDir() { // others link to one with several controllers
			roots = append(roots, filepath.Join(cgroups, entry.Name()))
		}
	}
	return roots, true, nil
}

// makeCgroup makes a cgroup for all Pods of a node, and says whether the machine
// has cgroups of version 1. The kubelet wants it with every controller there is.
func makeCgroup(name string) (v1 bool, err error) {
	roots, v1, err := hierarchies()
	if err != nil {
		return false, err
	}
	for _, root := range roots {
		group := filepath.Join(root, name)
		if err := os.Mkdir(group, 0o755); err != nil { //nolint:gosec // as the kernel makes the others
			return v1, err
		}
		if !v1 {
			controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers")) //nolint:gosec // of the kernel
			if err != nil {
				return v1, err
			}
			for controller := range bytes.FieldsSeq(controllers) {
				// Most are passed on already. Where one cannot be that the kubelet
				// needs, it says so.
				_ = os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), append([]byte("+"), controller...), 0)
			}
			continue
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // empty at first, which lets nothing run
			value, err := os.ReadFile(filepath.Join(root, file)) //nolint:gosec // of the kernel
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(group, file), value, 0) //nolint:gosec // of the kernel
			}
			if err != nil {
				return v1, err
			}
		}
	}
	return v1, nil
}

// removeCgroups removes cgroups in which nothing runs any more, in all
// hierarchies, with those in them: all whose names match a pattern, which may
// be none.
func removeCgroups(pattern string) error {
	var errs []error
	for _, folder := range []string{cgroups, filepath.Join(cgroups, "*")} {
		tops, err := filepath.Glob(filepath.Join(folder, pattern))
		errs = append(errs, err)
		for _, top := range tops {
			errs = append(errs, removeGroup(top))
		}
	}
	return errors.Join(errs...)
}

func removeGroup(top string) error {
	var groups []string
	err := filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			groups = append(groups, path)
		}
		return err
	})
	// A hierarchy may go by several names.
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list cgroup %s: %w", top, err)
	}
	for _, group := range slices.Backward(groups) {
		if err := syscall.Rmdir(group); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove cgroup %s: %w", group, err)
		}
	}
	return nil
}
