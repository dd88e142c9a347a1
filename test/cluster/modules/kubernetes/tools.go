//go:build tools

// Package kubernetes pins the Kubernetes programs that package cluster builds.
// The blank imports keep their dependencies in go.mod and go.sum.
//
// For another version v1.X.Y, set it in go.mod, every replacement to v0.X.Y,
// and run `go mod tidy` here. The list of replacements is that of the modules
// that Kubernetes' own go.mod requires at v0.0.0.
package kubernetes

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-controller-manager"
	_ "k8s.io/kubernetes/cmd/kubelet"
)
