//go:build !linux

package cluster

import "errors"

var errNotLinux = errors.New("a node needs Linux")

func canIsolate() error               { return errNotLinux }
func isolate(string) error            { return errNotLinux }
func makeCgroup(string) (bool, error) { return false, errNotLinux }
func removeCgroups(string) error      { return nil }
