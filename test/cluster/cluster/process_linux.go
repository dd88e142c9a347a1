package cluster

import "syscall"

// dieWithParent has the kernel kill the child when the thread that forks it
// ends, so that nothing survives a parent that was killed itself.
func dieWithParent(attr *syscall.SysProcAttr) {
	attr.Pdeathsig = syscall.SIGKILL
}
