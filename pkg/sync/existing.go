package sync

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"unique"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
)

// Ownership says whose a Secret is that has the name of a target.
type Ownership uint8

const (
	// Foreign is somebody else's, and is never touched.
	Foreign Ownership = iota
	// Ours carries our label and was applied by our field manager.
	Ours
	// Legacy was written by banzaicloud/imps: it carries its label and its annotation.
	Legacy
	// Restored carries our label and a revision, but our field manager is gone, as after
	// a restore from a backup. It is ours where a resource selects it, else a user's copy.
	Restored
)

// Existing is the part of a target Secret's metadata that decides what is done with it.
// It never holds data of the Secret.
type Existing struct {
	UID             types.UID
	ResourceVersion string
	Ownership       Ownership
	// Deleting: it has a deletion timestamp.
	Deleting bool
	// OwnerUID is the value of LabelOwnerUID.
	OwnerUID types.UID
	// Revision is zero where there is none that parses, or where somebody else has set it.
	Revision Revision
	// OwnerReferences are their UIDs, sorted.
	OwnerReferences []types.UID
	// fields are the fields that our manager owns, as FieldsV1. Nearly all Secrets share
	// one value, so it is held once.
	fields unique.Handle[string]
}

// ExistingOf judges the metadata of a Secret.
func ExistingOf(m *metav1.PartialObjectMetadata) Existing {
	e := Existing{
		UID:             m.UID,
		ResourceVersion: m.ResourceVersion,
		Deleting:        m.DeletionTimestamp != nil,
		OwnerUID:        types.UID(m.Labels[LabelOwnerUID]),
	}
	revision, err := ParseRevision(m.Annotations[AnnotationRevision])
	if err == nil {
		e.Revision = revision
	}
	for i := range m.OwnerReferences {
		e.OwnerReferences = append(e.OwnerReferences, m.OwnerReferences[i].UID)
	}
	slices.Sort(e.OwnerReferences)
	applied := false
	for i := range m.ManagedFields {
		entry := &m.ManagedFields[i]
		if isOurEntry(entry) {
			applied = true
			fields := ""
			if entry.FieldsV1 != nil {
				fields = entry.FieldsV1.GetRawString()
			}
			e.fields = unique.Make(fields)
		}
	}
	if applied && !strings.Contains(e.fields.Value(), `"f:`+AnnotationRevision+`"`) {
		e.Revision = Revision{}
	}
	_, legacy := m.Annotations[AnnotationLegacyApplied]
	switch {
	case e.OwnerUID == "":
	case legacy:
		e.Ownership = Legacy
	case applied:
		e.Ownership = Ours
	case e.Revision.UID != "":
		e.Ownership = Restored
	}
	return e
}

// isOurEntry reports whether a managedFields entry is our apply. A client whose default
// name happens to be ours has operation Update, and does not count.
func isOurEntry(entry *metav1.ManagedFieldsEntry) bool {
	return entry.Manager == FieldManager && entry.Operation == metav1.ManagedFieldsOperationApply && entry.Subresource == ""
}

// Expectation answers whether a Secret is still as one target was applied. Not safe for
// concurrent use.
type Expectation struct {
	target Target
	want   *fieldpath.Set
	// known are the verdicts on FieldsV1 seen so far; in practice one.
	known map[unique.Handle[string]]bool
}

// NewExpectation prepares the comparison with a target.
func NewExpectation(t Target) (*Expectation, error) {
	want, err := t.fields()
	if err != nil {
		return nil, err
	}
	return &Expectation{target: t, want: want, known: make(map[unique.Handle[string]]bool, 1)}, nil
}

// Target is what is expected.
func (e *Expectation) Target() Target { return e.target }

// Met reports whether the Secret has the target's revision and owner references, and all
// that was applied is still ours: whoever changes a value takes the ownership of its
// field, so an edit shows in the metadata.
func (e *Expectation) Met(x Existing) bool {
	if x.Ownership != Ours || x.Revision != e.target.revision || x.OwnerUID != e.target.revision.UID {
		return false
	}
	for _, uid := range e.target.owners {
		if !slices.Contains(x.OwnerReferences, uid) {
			return false
		}
	}
	var zero unique.Handle[string]
	if x.fields == zero {
		return false
	}
	met, ok := e.known[x.fields]
	if !ok {
		met = e.fieldsMet(x.fields.Value())
		e.known[x.fields] = met
	}
	return met
}

// fieldsMet reports whether our manager owns all that is wanted, and no owner reference
// beyond: one that only we put there goes with the next apply.
func (e *Expectation) fieldsMet(fieldsV1 string) bool {
	have := &fieldpath.Set{}
	if have.FromJSON(strings.NewReader(fieldsV1)) != nil || !e.want.Difference(have).Empty() {
		return false
	}
	references := fieldpath.MakePathOrDie("metadata", "ownerReferences")
	extra := have.Leaves().Difference(e.want).WithPrefix(references[0]).WithPrefix(references[1])
	return extra.Empty()
}

// HasOwner reports whether the Secret carries an owner reference to this resource.
func (x Existing) HasOwner(uid types.UID) bool { return slices.Contains(x.OwnerReferences, uid) }

// fields are the fields that the server records for an apply of the target.
// https://kubernetes.io/docs/reference/using-api/server-side-apply/#field-management
func (t Target) fields() (*fieldpath.Set, error) {
	var body targetBody
	if err := json.Unmarshal([]byte(t.body.Reveal()), &body); err != nil {
		return nil, fmt.Errorf("target Secret %s: its own body is not valid JSON", t.name)
	}
	set := fieldpath.NewSet(fieldpath.MakePathOrDie("type"))
	for key := range body.Data {
		set.Insert(fieldpath.MakePathOrDie("data", key))
	}
	for key := range body.Metadata.Labels {
		set.Insert(fieldpath.MakePathOrDie("metadata", "labels", key))
	}
	for key := range body.Metadata.Annotations {
		set.Insert(fieldpath.MakePathOrDie("metadata", "annotations", key))
	}
	for _, ref := range body.Metadata.OwnerReferences {
		set.Insert(fieldpath.MakePathOrDie("metadata", "ownerReferences", fieldpath.KeyByFields("uid", string(ref.UID))))
	}
	return set, nil
}

// jsonPointer escapes a key (RFC 6901).
func jsonPointer(key string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(key)
}

// jsonPatchOp is one operation of RFC 6902.
type jsonPatchOp struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// AdoptionPatch returns the JSON patch that makes a Legacy or Restored Secret ours, so
// that an apply can then change it: it removes IMPS's annotation, which holds plaintext
// credentials, and turns the entries of IMPS in managedFields into one of ours. An apply
// alone would leave both behind. Data, labels and owner references stay as they are.
// The patch fails where the Secret is at another resourceVersion.
func AdoptionPatch(m *metav1.PartialObjectMetadata) ([]byte, error) {
	legacyField := fieldpath.MakePathOrDie("metadata", "annotations", AnnotationLegacyApplied)
	revisionField := fieldpath.MakePathOrDie("metadata", "annotations", AnnotationRevision)

	ours := &fieldpath.Set{}
	var others []metav1.ManagedFieldsEntry
	for _, entry := range m.ManagedFields {
		fields := &fieldpath.Set{}
		if entry.FieldsV1 != nil {
			if err := fields.FromJSON(entry.FieldsV1.GetRawReader()); err != nil {
				return nil, fmt.Errorf("managedFields entry of %q: not valid FieldsV1", entry.Manager)
			}
		}
		// IMPS's field manager is named after its executable, which tells nothing; what
		// only it writes is its annotation.
		if isOurEntry(&entry) || fields.Has(legacyField) {
			ours = ours.Union(fields)
			continue
		}
		others = append(others, entry)
	}
	// What any of our targets has is ours from now on, so that the next apply removes
	// what the resource no longer asks for.
	ours.Insert(fieldpath.MakePathOrDie("type"))
	ours.Insert(fieldpath.MakePathOrDie("data", ".dockerconfigjson"))
	ours.Insert(fieldpath.MakePathOrDie("metadata", "labels", LabelOwnerUID))
	for i := range m.OwnerReferences {
		ours.Insert(fieldpath.MakePathOrDie("metadata", "ownerReferences", fieldpath.KeyByFields("uid", string(m.OwnerReferences[i].UID))))
	}
	// Only leaves, as an apply has them: a parent such as f:labels is no field of ours.
	ours = ours.Leaves().Difference(fieldpath.NewSet(legacyField, revisionField))
	raw, err := ours.ToJSON()
	if err != nil {
		return nil, fmt.Errorf("encode managedFields: %w", err)
	}
	now := metav1.Now()
	entries := append(others, metav1.ManagedFieldsEntry{
		Manager: FieldManager, Operation: metav1.ManagedFieldsOperationApply,
		APIVersion: "v1", Time: &now, FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(string(raw)),
	})
	patch := []jsonPatchOp{
		{Op: "replace", Path: "/metadata/resourceVersion", Value: m.ResourceVersion},
		{Op: "add", Path: "/metadata/managedFields", Value: entries},
	}
	// A revision goes too: nobody knows who has set it, and it must not count as ours.
	for _, annotation := range []string{AnnotationLegacyApplied, AnnotationRevision} {
		if _, ok := m.Annotations[annotation]; ok {
			patch = append(patch, jsonPatchOp{Op: "remove", Path: "/metadata/annotations/" + jsonPointer(annotation)})
		}
	}
	return json.Marshal(patch)
}
