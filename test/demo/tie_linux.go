package main

import "syscall"

// tie gives a process a group of its own, so that Ctrl-C reaches the demo only, which then ends it
// in order; and has the kernel end it should the demo be killed.
func tie() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
