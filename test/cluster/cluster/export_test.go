package cluster

// Shared returns the cluster of all tests, for those that use packages which
// use this one.
func Shared() *Cluster { return shared }
