//go:build tools

// Package etcd pins the etcd server that package cluster builds.
// The blank import keeps its dependencies in go.mod and go.sum.
package etcd

import (
	_ "go.etcd.io/etcd/server/v3"
)
