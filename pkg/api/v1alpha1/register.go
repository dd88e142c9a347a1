package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var (
	// GroupVersion is the API group and version of the types of this package.
	GroupVersion = schema.GroupVersion{Group: "images.banzaicloud.io", Version: "v1alpha1"}

	// Kind is the kind of ImagePullSecret.
	Kind = GroupVersion.WithKind("ImagePullSecret")

	// Resource is the REST resource of ImagePullSecret.
	Resource = GroupVersion.WithResource("imagepullsecrets")
)

// AddToScheme registers the types of this package with scheme. It never fails;
// the error is there for runtime.SchemeBuilder.
func AddToScheme(scheme *runtime.Scheme) error {
	scheme.AddKnownTypes(GroupVersion, &ImagePullSecret{}, &ImagePullSecretList{})
	metav1.AddToGroupVersion(scheme, GroupVersion)
	return nil
}
