package sync

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
)

// FormatVersions returns the versions of the rendered form that this build reads and
// writes, in ascending order.
func FormatVersions() []int { return []int{1} }

// Keys of a rendered Secret's data.
const (
	renderedKeyVersion = "formatVersion"
	renderedKeyRecord  = "rendered"
	renderedKeyTarget  = "target" // compressed
)

// maxTargetBytes bounds the body of a target: base64 grows by a third, and labels and annotations may do so sixfold.
const maxTargetBytes = 4 * corev1.MaxSecretSize

// ErrFormatVersion is returned for a rendered Secret of a version that this build cannot
// read. The reader keeps what it had.
var ErrFormatVersion = errors.New("rendered form of another version")

// Revision identifies one content of the target Secrets of one resource.
type Revision struct {
	// UID of the ImagePullSecret.
	UID types.UID
	// Counter grows by at least one with every change of the target object.
	Counter uint64
}

// String returns "<uid>.<counter>", the value of AnnotationRevision.
func (r Revision) String() string { return string(r.UID) + "." + strconv.FormatUint(r.Counter, 10) }

var errRevision = errors.New("revision is not <uid>.<counter>")

// ParseRevision parses what String returns, and nothing else. The error does not quote it.
func ParseRevision(s string) (Revision, error) {
	uid, counter, _ := strings.Cut(s, ".")
	n, err := strconv.ParseUint(counter, 10, 63) // room to count on
	r := Revision{UID: types.UID(uid), Counter: n}
	if err != nil || uid == "" || r.String() != s {
		return Revision{}, errRevision
	}
	return r, nil
}

// ResourceRef identifies an ImagePullSecret, and orders those that claim one target.
type ResourceRef struct {
	Name              string      `json:"name"`
	UID               types.UID   `json:"uid"`
	CreationTimestamp metav1.Time `json:"creationTimestamp"`
}

// RefOf returns the reference of a resource.
func RefOf(r *v1alpha1.ImagePullSecret) ResourceRef {
	return ResourceRef{Name: r.Name, UID: r.UID, CreationTimestamp: r.CreationTimestamp}
}

// Compare orders by creation time, then by name: of two resources that claim one target
// the lesser wins.
func (r ResourceRef) Compare(other ResourceRef) int {
	return cmp.Or(r.CreationTimestamp.Compare(other.CreationTimestamp.Time), cmp.Compare(r.Name, other.Name))
}

// OwnerReference is what a target Secret carries for this resource: no controller, and
// it does not block the owner's deletion.
func (r ResourceRef) OwnerReference() metav1.OwnerReference {
	return metav1.OwnerReference{
		APIVersion: v1alpha1.GroupVersion.String(), Kind: v1alpha1.Kind.Kind, Name: r.Name, UID: r.UID,
	}
}

// Rendered is what the coordinator tells every agent about one resource. It is immutable.
type Rendered struct {
	// FormatVersion is the version that it was decoded from, or is encoded in.
	FormatVersion int
	// Resource is the ImagePullSecret that this was rendered from.
	Resource ResourceRef
	// Namespaces and Pods are its selectors.
	Namespaces v1alpha1.NamespaceSelector
	Pods       v1alpha1.PodSelector
	// Rescue: Pods that are stuck on a pull which the Secret serves are to be reported.
	Rescue bool
	// Kubelet says which Pods the kubelets of their nodes may serve the credentials to; empty for none.
	Kubelet v1alpha1.KubeletScope
	// Expiries are when credentials expire, by registry, those that do.
	Expiries map[string]time.Time
	// Target is the object that is applied in every selected namespace.
	Target Target
}

// SameSelectors reports whether both select the same.
func (r Rendered) SameSelectors(other Rendered) bool {
	return equality.Semantic.DeepEqual(r.Namespaces, other.Namespaces) && equality.Semantic.DeepEqual(r.Pods, other.Pods)
}

// renderedRecord is the JSON under renderedKeyRecord. It holds no credential.
type renderedRecord struct {
	Resource           ResourceRef                `json:"resource"`
	Namespaces         v1alpha1.NamespaceSelector `json:"namespaces"`
	NamespacesWithPods v1alpha1.PodSelector       `json:"namespacesWithPods"`
	Rescue             bool                       `json:"rescue,omitempty"`
	Kubelet            v1alpha1.KubeletScope      `json:"kubelet,omitempty"`
	Expiries           map[string]time.Time       `json:"expiries,omitempty"`
}

// EncodeRendered returns the data of the rendered Secret. The same input gives the same bytes.
func EncodeRendered(r Rendered) (map[string][]byte, error) {
	record, err := json.Marshal(renderedRecord{
		Resource: r.Resource, Namespaces: r.Namespaces, NamespacesWithPods: r.Pods, Rescue: r.Rescue, Kubelet: r.Kubelet, Expiries: r.Expiries,
	})
	if err != nil {
		return nil, fmt.Errorf("encode the rendered form of %s: %w", r.Resource.Name, err)
	}
	data := map[string][]byte{
		renderedKeyVersion: []byte(strconv.Itoa(r.FormatVersion)),
		renderedKeyRecord:  record,
		renderedKeyTarget:  Compress([]byte(r.Target.body.Reveal())),
	}
	if n := r.Target.body.Len(); n > maxTargetBytes {
		return nil, fmt.Errorf("the target Secret is too large: %d bytes with its labels and annotations, where %d are the limit", n, maxTargetBytes)
	}
	size := 0
	for key, value := range data {
		size += len(key) + len(value)
	}
	if size > corev1.MaxSecretSize {
		return nil, fmt.Errorf("the merged credentials are too large: rendered they are %d bytes, and a Secret holds at most %d; list fewer registries", size, corev1.MaxSecretSize)
	}
	return data, nil
}

// DecodeRendered decodes a rendered Secret of one of these versions. ErrFormatVersion says
// that it is of another one; any other error that it is not what this package wrote. No
// error holds a piece of the data.
//
// The name must be that of the resource: agents may create Secrets of the target names in
// every namespace, and none of these must ever pass for a rendered one.
func DecodeRendered(secret *corev1.Secret, versions []int) (Rendered, error) {
	if secret.Type != RenderedType {
		return Rendered{}, fmt.Errorf("rendered form: the type is not %s", RenderedType)
	}
	r, err := decodeRendered(secret.Data, versions)
	if err == nil && secret.Name != RenderedName(r.Resource.UID) {
		return Rendered{}, errors.New("rendered form: the Secret's name is not that of the resource")
	}
	return r, err
}

func decodeRendered(data map[string][]byte, versions []int) (Rendered, error) {
	i := slices.IndexFunc(versions, func(v int) bool { return string(data[renderedKeyVersion]) == strconv.Itoa(v) })
	if i < 0 {
		return Rendered{}, fmt.Errorf("%w: this build reads %v", ErrFormatVersion, versions)
	}
	var record renderedRecord
	if err := json.Unmarshal(data[renderedKeyRecord], &record); err != nil {
		return Rendered{}, errors.New("rendered form: the record is not valid JSON")
	}
	body, err := Expand(data[renderedKeyTarget], maxTargetBytes)
	if err != nil {
		return Rendered{}, fmt.Errorf("rendered form: the target: %w", err)
	}
	target, err := parseTarget(body)
	if err != nil {
		return Rendered{}, fmt.Errorf("rendered form: %w", err)
	}
	if record.Resource.UID == "" || record.Resource.UID != target.revision.UID {
		return Rendered{}, errors.New("rendered form: record and target are of different resources")
	}
	return Rendered{
		FormatVersion: versions[i], Resource: record.Resource, Namespaces: record.Namespaces, Pods: record.NamespacesWithPods,
		Rescue: record.Rescue, Kubelet: record.Kubelet, Expiries: record.Expiries, Target: target,
	}, nil
}

// Target is the Secret that a resource puts into every selected namespace: a complete
// apply request, but for the namespace, which only the URL names. It is immutable.
type Target struct {
	name     string
	revision Revision
	owners   []types.UID
	body     dockerconfig.Sensitive
}

// bodyHead is how every body starts, so that preconditions can be put in front of the
// other metadata.
const bodyHead = `{"apiVersion":"v1","kind":"Secret","metadata":{`

// targetBody is an apply request. Its fields stand in the order that bodyHead wants.
type targetBody struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   targetMetadata    `json:"metadata"`
	Type       corev1.SecretType `json:"type"`
	Data       map[string][]byte `json:"data"`
}

type targetMetadata struct {
	Name            string                  `json:"name"`
	Labels          map[string]string       `json:"labels"`
	Annotations     map[string]string       `json:"annotations"`
	OwnerReferences []metav1.OwnerReference `json:"ownerReferences"`
}

// NewTarget returns the target Secret of a resource at a counter, with the credentials
// that config holds.
func NewTarget(owner ResourceRef, spec v1alpha1.TargetSecretSpec, counter uint64, config dockerconfig.Sensitive) (Target, error) {
	revision := Revision{UID: owner.UID, Counter: counter}
	labels, annotations := maps.Clone(spec.Labels), maps.Clone(spec.Annotations)
	if labels == nil {
		labels = map[string]string{}
	}
	if annotations == nil {
		annotations = map[string]string{}
	}
	// The reserved ones win, and IMPS's annotation never comes back through a spec.
	labels[LabelOwnerUID] = string(owner.UID)
	annotations[AnnotationRevision] = revision.String()
	delete(annotations, AnnotationLegacyApplied)
	return newTarget(revision, targetBody{
		APIVersion: "v1",
		Kind:       "Secret",
		Metadata: targetMetadata{
			Name: spec.Name, Labels: labels, Annotations: annotations,
			OwnerReferences: []metav1.OwnerReference{owner.OwnerReference()},
		},
		Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(config.Reveal())},
	})
}

func newTarget(revision Revision, body targetBody) (Target, error) {
	raw, err := json.Marshal(body)
	if err != nil {
		return Target{}, fmt.Errorf("encode target Secret %s: %w", body.Metadata.Name, err)
	}
	target := Target{name: body.Metadata.Name, revision: revision, body: dockerconfig.NewSensitive(raw)}
	for _, ref := range body.Metadata.OwnerReferences {
		target.owners = append(target.owners, ref.UID)
	}
	slices.Sort(target.owners)
	return target, nil
}

// parseTarget is strict: it takes what newTarget made and nothing else.
func parseTarget(raw []byte) (Target, error) {
	var body targetBody
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&body); err != nil {
		return Target{}, errors.New("the target is not valid JSON")
	}
	if body.Kind != "Secret" || body.APIVersion != "v1" || body.Type != corev1.SecretTypeDockerConfigJson || body.Metadata.Name == "" {
		return Target{}, errors.New("the target is not a named pull Secret")
	}
	revision, err := ParseRevision(body.Metadata.Annotations[AnnotationRevision])
	if err != nil {
		return Target{}, fmt.Errorf("the target's %w", err)
	}
	if body.Metadata.Labels[LabelOwnerUID] != string(revision.UID) {
		return Target{}, errors.New("the target's owner label and revision are of different resources")
	}
	target, err := newTarget(revision, body)
	if err != nil {
		return Target{}, err
	}
	if target.body.Reveal() != string(raw) {
		return Target{}, errors.New("the target is not in its canonical form")
	}
	return target, nil
}

// Name of the Secret.
func (t Target) Name() string { return t.name }

// Revision of the content.
func (t Target) Revision() Revision { return t.revision }

// IsZero reports whether there is no target.
func (t Target) IsZero() bool { return t.body.IsZero() }

// Owners are the UIDs of the owner references, sorted. The slice must not be changed.
func (t Target) Owners() []types.UID { return t.owners }

// SameContent reports whether both are the same but for the counter.
func (t Target) SameContent(other Target) bool {
	if t.revision.UID != other.revision.UID || t.name != other.name {
		return false
	}
	// The counter stands in the annotation only, which holds nothing else. A label of the
	// same text comes before it; what follows it are references and base64.
	strip := func(t Target) string {
		body, annotation := t.body.Reveal(), `"`+AnnotationRevision+`":"`
		before, after := cutLast(body, annotation+t.revision.String()+`"`)
		return before + annotation + `"` + after
	}
	return strip(t) == strip(other)
}

// cutLast slices s around the last instance of sep.
func cutLast(s, sep string) (before, after string) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, ""
	}
	return s[:i], s[i+len(sep):]
}

// Config returns the credentials that the Secret holds.
func (t Target) Config() (dockerconfig.Sensitive, error) {
	var body targetBody
	if err := json.Unmarshal([]byte(t.body.Reveal()), &body); err != nil {
		return dockerconfig.Sensitive{}, fmt.Errorf("target Secret %s: its own body is not valid JSON", t.name)
	}
	return dockerconfig.NewSensitive(body.Data[corev1.DockerConfigJsonKey]), nil
}

// Credentials are those that the Secret holds, parsed.
func (t Target) Credentials() (dockerconfig.Config, error) {
	raw, err := t.Config()
	if err != nil {
		return dockerconfig.Config{}, err
	}
	config, _, err := dockerconfig.Parse(string(corev1.SecretTypeDockerConfigJson), map[string][]byte{corev1.DockerConfigJsonKey: []byte(raw.Reveal())})
	return config, err
}

// WithOwners returns the target with one owner reference for each of these resources.
func (t Target) WithOwners(owners []ResourceRef) (Target, error) {
	return t.with(t.revision, func(body *targetBody) {
		body.Metadata.OwnerReferences = nil
		for _, owner := range owners {
			body.Metadata.OwnerReferences = append(body.Metadata.OwnerReferences, owner.OwnerReference())
		}
	})
}

// WithConfig returns the target with other credentials, at another counter.
func (t Target) WithConfig(counter uint64, config dockerconfig.Sensitive) (Target, error) {
	revision := Revision{UID: t.revision.UID, Counter: counter}
	return t.with(revision, func(body *targetBody) {
		body.Metadata.Annotations[AnnotationRevision] = revision.String()
		body.Data = map[string][]byte{corev1.DockerConfigJsonKey: []byte(config.Reveal())}
	})
}

// with returns the target with a change.
func (t Target) with(revision Revision, change func(*targetBody)) (Target, error) {
	var body targetBody
	if err := json.Unmarshal([]byte(t.body.Reveal()), &body); err != nil {
		return Target{}, fmt.Errorf("target Secret %s: its own body is not valid JSON", t.name)
	}
	change(&body)
	return newTarget(revision, body)
}

// Body returns the apply request. A resourceVersion makes it a conflict where the Secret is
// at another one, a UID where it is another Secret or not there; each unless it is empty.
func (t Target) Body(uid types.UID, resourceVersion string) []byte {
	body := t.body.Reveal()
	precondition := ""
	if uid != "" {
		precondition += `"uid":` + strconv.Quote(string(uid)) + `,`
	}
	if resourceVersion != "" {
		precondition += `"resourceVersion":` + strconv.Quote(resourceVersion) + `,`
	}
	out := make([]byte, 0, len(body)+len(precondition))
	out = append(out, bodyHead...)
	out = append(out, precondition...)
	return append(out, body[len(bodyHead):]...)
}
