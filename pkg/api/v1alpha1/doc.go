// Package v1alpha1 holds the API types of images.banzaicloud.io/v1alpha1.
//
// The group, version, kind, scope, short name, spec fields, status strings and
// print columns are those of banzaicloud/imps v0.1.0 to v0.3.13 and of its fork
// to v0.3.20: a resource that any of them stored is accepted unchanged. Fields
// that imps adds are optional.
//
// +kubebuilder:object:generate=true
// +groupName=images.banzaicloud.io
package v1alpha1
