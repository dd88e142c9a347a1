//go:build tools

// Package containerd pins the programs of containerd that package cluster
// builds for a node. The blank imports keep their dependencies in go.mod and
// go.sum.
package containerd

import (
	_ "github.com/containerd/containerd/v2/cmd/containerd"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"
	_ "github.com/containerd/containerd/v2/cmd/ctr"
)
