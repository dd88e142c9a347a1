//go:build !linux

package main

import "syscall"

// tie gives a process a group of its own, so that Ctrl-C reaches the demo only.
func tie() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
