// Package sync holds what the two duties of imps share: which namespaces a resource
// selects, the rendered form that the coordinator writes and every agent reads, the
// node report, and the rules by which a target Secret is judged and written.
//
// The duties themselves are in the packages cluster and node. This package decides
// nothing about when something happens and runs no goroutine but a Mirror's.
//
// Importers alias it impsync, since its name shadows the standard library's sync.
package sync
