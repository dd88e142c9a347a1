package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Strings of status.status, as banzaicloud/imps writes them.
const (
	StatusReady  = "Ready"
	StatusFailed = "Failed"
)

// SourceOK is the value of a status.sourceSecretStatus entry that has no error.
const SourceOK = "Ok"

// Types of status.conditions.
const (
	// ConditionReady is true when everything that the resource asks for is done.
	ConditionReady = "Ready"
	// ConditionSourcesReady is true when every credential could be read.
	ConditionSourcesReady = "SourcesReady"
	// ConditionSecretsReady is true when every selected namespace has the Secret.
	ConditionSecretsReady = "SecretsReady"
	// ConditionServiceAccountsReady is about spec.target.serviceAccounts; absent where that is.
	ConditionServiceAccountsReady = "ServiceAccountsReady"
	// ConditionKubeletReady is about spec.target.kubelet; absent where that is.
	ConditionKubeletReady = "KubeletReady"
)

// ManagedNamespacesMax is how many names status.managedNamespaces holds at the most;
// status.namespaces has the true numbers.
const ManagedNamespacesMax = 1000

// ImagePullSecret says which registry credentials become a pull Secret, and in which namespaces.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=imps
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="State",type=string,JSONPath=`.status.status`
// +kubebuilder:printcolumn:name="Reconciled",type=date,JSONPath=`.status.lastSuccessfulReconciliation`
// +kubebuilder:printcolumn:name="Validity seconds",type=integer,JSONPath=`.status.validitySeconds`
// +kubebuilder:printcolumn:name="Secret Name",type=string,JSONPath=`.spec.target.secret.name`
// +kubebuilder:printcolumn:name="Namespaces",type=string,JSONPath=`.status.managedNamespaces`
type ImagePullSecret struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec ImagePullSecretSpec `json:"spec,omitempty"`
	// +optional
	Status ImagePullSecretStatus `json:"status,omitempty"`
}

// ImagePullSecretList is a list of ImagePullSecrets.
//
// +kubebuilder:object:root=true
type ImagePullSecretList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []ImagePullSecret `json:"items"`
}

// ImagePullSecretSpec is what the user asks for.
type ImagePullSecretSpec struct {
	// Target says which Secret is written, and where.
	Target TargetSpec `json:"target"`
	// Registry says which credentials the Secret holds.
	Registry RegistrySpec `json:"registry"`
}

// TargetSpec says which Secret is written, and where. A namespace is selected when
// any entry of namespaces or namespacesWithPods matches.
type TargetSpec struct {
	// Secret is the pull Secret that every selected namespace gets.
	Secret TargetSecretSpec `json:"secret"`
	// Namespaces selects namespaces by what they are.
	// +optional
	Namespaces NamespaceSelector `json:"namespaces,omitempty"`
	// NamespacesWithPods selects namespaces by the Pods in them.
	// +optional
	NamespacesWithPods PodSelector `json:"namespacesWithPods,omitempty"`
	// ServiceAccounts attaches the Secret to these ServiceAccounts of the selected namespaces.
	// +optional
	ServiceAccounts *ServiceAccountSelector `json:"serviceAccounts,omitempty"`
	// Rescue evicts Pods that cannot pull what the Secret serves, as they were admitted before their ServiceAccount named it.
	// The coordinator's --allow-rescue must allow it.
	// +optional
	Rescue bool `json:"rescue,omitempty"`
	// Kubelet serves the credentials to the kubelets of the nodes too; absent: not.
	// +optional
	Kubelet *KubeletSpec `json:"kubelet,omitempty"`
}

// TargetSecretSpec names the pull Secret and what is put on it.
type TargetSecretSpec struct {
	// Name of the Secret in every selected namespace.
	Name string `json:"name"`
	// Labels of the Secret.
	// +optional
	Labels map[string]string `json:"labels,omitempty"`
	// Annotations of the Secret.
	// +optional
	Annotations map[string]string `json:"annotations,omitempty"`
}

// NamespaceSelector selects a namespace when any of its entries matches. An empty
// entry (`{}`) of labels or annotations matches every namespace; an empty list none.
type NamespaceSelector struct {
	// Names of namespaces; one that does not exist is served once it does.
	// +optional
	Names []string `json:"names,omitempty"`
	// Labels select by the namespace's labels.
	// +optional
	Labels []metav1.LabelSelector `json:"labels,omitempty"`
	// Annotations select by the namespace's annotations.
	// +optional
	Annotations []AnnotationSelector `json:"annotations,omitempty"`
}

// PodSelector selects a namespace when any Pod in it, of any phase, matches any entry.
type PodSelector struct {
	// Labels select by a Pod's labels.
	// +optional
	Labels []metav1.LabelSelector `json:"labels,omitempty"`
	// Annotations select by a Pod's annotations.
	// +optional
	Annotations []AnnotationSelector `json:"annotations,omitempty"`
}

// AnnotationSelector is a label selector's counterpart for annotations. All its parts
// must match. Values are plain strings, of any length and content.
type AnnotationSelector struct {
	// MatchAnnotations are annotations that must be there with these values.
	// +optional
	MatchAnnotations map[string]string `json:"matchAnnotations,omitempty"`
	// MatchExpressions are requirements on single annotations.
	// +optional
	MatchExpressions []AnnotationSelectorRequirement `json:"matchExpressions,omitempty"`
}

// AnnotationSelectorRequirement is a requirement on one annotation.
type AnnotationSelectorRequirement struct {
	// Key of the annotation.
	Key string `json:"key"`
	// Operator is In, NotIn, Exists or DoesNotExist.
	Operator metav1.LabelSelectorOperator `json:"operator"`
	// Values for In and NotIn; empty for the others.
	// +optional
	Values []string `json:"values,omitempty"`
}

// ServiceAccountSelector selects ServiceAccounts of a selected namespace.
type ServiceAccountSelector struct {
	// Names of ServiceAccounts.
	// +optional
	Names []string `json:"names,omitempty"`
	// Labels select by the ServiceAccount's labels; `[{}]` means all.
	// +optional
	Labels []metav1.LabelSelector `json:"labels,omitempty"`
}

// KubeletScope says which Pods of a node may use the credentials.
type KubeletScope string

// Scopes of KubeletSpec.
const (
	// KubeletScopeNamespace serves only Pods of the selected namespaces.
	KubeletScopeNamespace KubeletScope = "Namespace"
	// KubeletScopeNode serves every Pod of the node.
	KubeletScopeNode KubeletScope = "Node"
)

// KubeletSpec serves the credentials to kubelets.
type KubeletSpec struct {
	// Scope is Namespace (only Pods of the selected namespaces; also when empty) or
	// Node (every Pod of the node).
	// +optional
	// +kubebuilder:validation:Enum=Namespace;Node
	Scope KubeletScope `json:"scope,omitempty"`
}

// KubeletScope returns which Pods the kubelets may serve; empty for none.
func (t TargetSpec) KubeletScope() KubeletScope {
	switch {
	case t.Kubelet == nil:
		return ""
	case t.Kubelet.Scope == "":
		return KubeletScopeNamespace
	default:
		return t.Kubelet.Scope
	}
}

// RegistrySpec says where the credentials come from.
type RegistrySpec struct {
	// Credentials are merged in this order: for one registry the last listed wins.
	Credentials []CredentialSource `json:"credentials"`
}

// CredentialSource is a Secret, by name and namespace, or an ECR registry.
//
// +kubebuilder:validation:XValidation:rule="has(self.ecr) ? !has(self.name) && !has(self.namespace) : has(self.name) && has(self.namespace)",message="exactly one form per entry: either name and namespace of a Secret, or ecr"
type CredentialSource struct {
	// Name of a Secret with a docker config or with IMPS's ECR keys.
	// +optional
	Name string `json:"name,omitempty"`
	// Namespace of that Secret.
	// +optional
	Namespace string `json:"namespace,omitempty"`
	// ECR takes the credentials from Amazon ECR with the coordinator's own AWS identity.
	// +optional
	ECR *ECRSource `json:"ecr,omitempty"`
}

// ECRSource names ECR registries that the coordinator's own AWS identity may read.
type ECRSource struct {
	// Registries are hosts such as 123456789012.dkr.ecr.eu-central-1.amazonaws.com.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=500
	Registries []string `json:"registries"`
	// RoleARN is assumed first, when given.
	// +optional
	RoleARN string `json:"roleARN,omitempty"`
	// ExternalID is sent with the assumption of RoleARN.
	// +optional
	ExternalID string `json:"externalID,omitempty"`
}

// ImagePullSecretStatus is what imps found and did.
type ImagePullSecretStatus struct {
	// Status is Ready or Failed.
	// +optional
	Status string `json:"status,omitempty"`
	// Reason says why Status is Failed.
	// +optional
	Reason string `json:"reason,omitempty"`
	// LastSuccessfulReconciliation is when something changed last and all of it was done.
	// +optional
	LastSuccessfulReconciliation *metav1.Time `json:"lastSuccessfulReconciliation,omitempty"`
	// ValiditySeconds is the time to the earliest expiry of a credential when the status
	// was written; absent where nothing expires.
	// +optional
	ValiditySeconds int64 `json:"validitySeconds,omitempty"`
	// ManagedNamespaces are the namespaces that have the Secret, sorted; the first 1,000.
	// +optional
	ManagedNamespaces []string `json:"managedNamespaces,omitempty"`
	// SourceSecretStatus is Ok or an error for each source, by <namespace>.<name>, or
	// ecr.<first registry>, from the second such source on with #2 and so forth.
	// +optional
	SourceSecretStatus map[string]string `json:"sourceSecretStatus,omitempty"`
	// ObservedGeneration is the generation of the spec that this status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Namespaces counts namespaces.
	// +optional
	Namespaces *NamespaceCounts `json:"namespaces,omitempty"`
	// Conditions are Ready, SourcesReady, SecretsReady, ServiceAccountsReady, KubeletReady.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// NamespaceCounts counts namespaces of a resource.
type NamespaceCounts struct {
	// Selected is how many namespaces the resource selects, without excluded ones.
	Selected int64 `json:"selected"`
	// Delivered is how many of them have the Secret.
	Delivered int64 `json:"delivered"`
	// Excluded is how many would be selected were they not in --excluded-namespaces.
	Excluded int64 `json:"excluded"`
}
