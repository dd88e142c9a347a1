//go:build !linux

package cluster

import "syscall"

// dieWithParent does nothing: only Linux can tie a child to its parent. After
// a crash of the parent the components have to be ended by hand.
func dieWithParent(*syscall.SysProcAttr) {}
