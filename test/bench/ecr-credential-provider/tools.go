//go:build tools

// Package ecrcredentialprovider pins the provider that the benchmark measures imps-credprovider beside.
// The blank import keeps its dependencies in go.mod and go.sum.
package ecrcredentialprovider

import (
	_ "k8s.io/cloud-provider-aws/cmd/ecr-credential-provider"
)
