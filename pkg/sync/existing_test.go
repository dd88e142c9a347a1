package sync

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
)

// fieldsOf returns FieldsV1 with one leaf for each path, as the API server records an apply.
func fieldsOf(t *testing.T, paths ...fieldpath.Path) string {
	t.Helper()
	raw, err := fieldpath.NewSet(paths...).ToJSON()
	require.NoError(t, err)
	return string(raw)
}

func labelPath(key string) fieldpath.Path {
	return fieldpath.MakePathOrDie("metadata", "labels", key)
}

func annotationPath(key string) fieldpath.Path {
	return fieldpath.MakePathOrDie("metadata", "annotations", key)
}

func ownerPath(uid types.UID) fieldpath.Path {
	return fieldpath.MakePathOrDie("metadata", "ownerReferences", fieldpath.KeyByFields("uid", string(uid)))
}

// appliedPaths are what the API server records for an apply of pullSecret().
func appliedPaths(owners ...types.UID) []fieldpath.Path {
	paths := []fieldpath.Path{
		fieldpath.MakePathOrDie("type"), fieldpath.MakePathOrDie("data", corev1.DockerConfigJsonKey),
		labelPath("l"), labelPath(LabelOwnerUID), annotationPath("a"), annotationPath(AnnotationRevision),
	}
	for _, uid := range owners {
		paths = append(paths, ownerPath(uid))
	}
	return paths
}

func entry(manager string, operation metav1.ManagedFieldsOperationType, fields string) metav1.ManagedFieldsEntry {
	e := metav1.ManagedFieldsEntry{Manager: manager, Operation: operation, APIVersion: "v1", FieldsType: "FieldsV1"}
	if fields != "" {
		e.FieldsV1 = metav1.NewFieldsV1(fields)
	}
	return e
}

func ourEntry(fields string) metav1.ManagedFieldsEntry {
	return entry(FieldManager, metav1.ManagedFieldsOperationApply, fields)
}

// delivered is the metadata of a Secret after an apply of pullSecret() at counter 7.
func delivered(t *testing.T) *metav1.PartialObjectMetadata {
	t.Helper()
	return &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{
		Namespace: "n", Name: "pull", UID: "secret-uid", ResourceVersion: "100",
		Labels:          map[string]string{"l": "1", LabelOwnerUID: string(uidA)},
		Annotations:     map[string]string{"a": "2", AnnotationRevision: string(uidA) + ".7"},
		OwnerReferences: []metav1.OwnerReference{refA().OwnerReference()},
		ManagedFields:   []metav1.ManagedFieldsEntry{ourEntry(fieldsOf(t, appliedPaths(uidA)...))},
	}}
}

// The two ways in which banzaicloud/imps's entry may look, with and without other annotations.
const (
	impsFields = `{"f:data":{".":{},"f:.dockerconfigjson":{}},` +
		`"f:metadata":{"f:annotations":{".":{},"f:banzaicloud.com/last-applied":{}},` +
		`"f:labels":{".":{},"f:images.banzaicloud.io/owner-uid":{}},` +
		`"f:ownerReferences":{".":{},"k:{\"uid\":\"` + string(uidA) + `\"}":{}}},"f:type":{}}`
	impsFieldsWithMore = `{"f:data":{".":{},"f:.dockerconfigjson":{}},` +
		`"f:metadata":{"f:annotations":{".":{},"f:banzaicloud.com/last-applied":{},"f:note":{}},` +
		`"f:labels":{".":{},"f:images.banzaicloud.io/owner-uid":{},"f:team":{}},` +
		`"f:ownerReferences":{".":{},"k:{\"uid\":\"` + string(uidA) + `\"}":{}}},"f:type":{}}`
	kubectlFields = `{"f:metadata":{"f:annotations":{"f:users/own":{}},"f:labels":{"f:users":{}}}}`
)

// fromIMPS is the metadata of a Secret as banzaicloud/imps leaves it.
func fromIMPS() *metav1.PartialObjectMetadata {
	return &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{
		Namespace: "n", Name: "pull", UID: "secret-uid", ResourceVersion: "100",
		Labels:          map[string]string{LabelOwnerUID: string(uidA)},
		Annotations:     map[string]string{AnnotationLegacyApplied: canary},
		OwnerReferences: []metav1.OwnerReference{refA().OwnerReference()},
		ManagedFields:   []metav1.ManagedFieldsEntry{entry("manager", metav1.ManagedFieldsOperationUpdate, impsFields)},
	}}
}

func TestExistingJudgesWhoseASecretIs(t *testing.T) {
	t.Parallel()
	revision := Revision{UID: uidA, Counter: 7}
	tests := map[string]struct {
		edit     func(m *metav1.PartialObjectMetadata)
		want     Ownership
		revision Revision
	}{
		"delivered: ours": {func(*metav1.PartialObjectMetadata) {}, Ours, revision},
		"with a user's label and manager beside: ours": {func(m *metav1.PartialObjectMetadata) {
			m.Labels["users"] = "x"
			m.ManagedFields = append(m.ManagedFields, entry("kubectl-label", metav1.ManagedFieldsOperationUpdate, kubectlFields))
		}, Ours, revision},
		"of any resource, also one that is gone: ours": {func(m *metav1.PartialObjectMetadata) {
			m.Labels[LabelOwnerUID] = "dead"
		}, Ours, revision},
		"without owner references, as orphaned: ours": {func(m *metav1.PartialObjectMetadata) {
			m.OwnerReferences = nil
		}, Ours, revision},
		"without a revision, but applied by us: ours": {func(m *metav1.PartialObjectMetadata) {
			delete(m.Annotations, AnnotationRevision)
		}, Ours, Revision{}},
		"with a revision that is none: ours, and the revision does not count": {func(m *metav1.PartialObjectMetadata) {
			m.Annotations[AnnotationRevision] = "99"
		}, Ours, Revision{}},
		"with a revision that somebody else has set: ours, and the revision does not count": {func(m *metav1.PartialObjectMetadata) {
			m.Annotations[AnnotationRevision] = string(uidA) + ".99"
			fields := strings.Replace(fieldsOf(t, appliedPaths(uidA)...), `"f:`+AnnotationRevision+`":{}`, ``, 1)
			fields = strings.Replace(strings.Replace(fields, `,}`, `}`, 1), `{,`, `{`, 1)
			m.ManagedFields = []metav1.ManagedFieldsEntry{
				entry("kubectl-annotate", metav1.ManagedFieldsOperationUpdate, fieldsOf(t, annotationPath(AnnotationRevision))), ourEntry(fields),
			}
		}, Ours, Revision{}},
		"applied by us, with an entry without fields: ours, and the revision does not count": {func(m *metav1.PartialObjectMetadata) {
			m.ManagedFields = []metav1.ManagedFieldsEntry{ourEntry("")}
		}, Ours, Revision{}},

		"nothing of ours at all: foreign": {func(m *metav1.PartialObjectMetadata) {
			m.ObjectMeta = metav1.ObjectMeta{Name: "pull"}
		}, Foreign, Revision{}},
		"the label alone: foreign": {func(m *metav1.PartialObjectMetadata) {
			m.Annotations, m.ManagedFields = nil, nil
		}, Foreign, Revision{}},
		"the label, by a client whose name is ours but that does not apply: foreign": {func(m *metav1.PartialObjectMetadata) {
			m.Annotations = nil
			m.ManagedFields[0].Operation = metav1.ManagedFieldsOperationUpdate
		}, Foreign, Revision{}},
		"the label, applied by another manager: foreign": {func(m *metav1.PartialObjectMetadata) {
			m.Annotations = nil
			m.ManagedFields[0].Manager = "kubectl"
		}, Foreign, Revision{}},
		"the label, by our manager on a subresource: foreign": {func(m *metav1.PartialObjectMetadata) {
			m.Annotations = nil
			m.ManagedFields[0].Subresource = "status"
		}, Foreign, Revision{}},
		"applied by us, but without the label: foreign": {func(m *metav1.PartialObjectMetadata) {
			delete(m.Labels, LabelOwnerUID)
		}, Foreign, revision},
		"applied by us, with an empty label: foreign": {func(m *metav1.PartialObjectMetadata) {
			m.Labels[LabelOwnerUID] = ""
		}, Foreign, revision},
		"the revision without the label: foreign": {func(m *metav1.PartialObjectMetadata) {
			m.Labels, m.ManagedFields = nil, nil
		}, Foreign, revision},
		"IMPS's annotation without its label: foreign": {func(m *metav1.PartialObjectMetadata) {
			m.ObjectMeta = fromIMPS().ObjectMeta
			m.Labels = nil
		}, Foreign, Revision{}},

		"written by IMPS: legacy": {func(m *metav1.PartialObjectMetadata) { m.ObjectMeta = fromIMPS().ObjectMeta }, Legacy, Revision{}},
		"written by IMPS, its managedFields cleared: legacy": {func(m *metav1.PartialObjectMetadata) {
			m.ObjectMeta = fromIMPS().ObjectMeta
			m.ManagedFields = nil
		}, Legacy, Revision{}},
		"written by IMPS, its annotation empty: legacy": {func(m *metav1.PartialObjectMetadata) {
			m.ObjectMeta = fromIMPS().ObjectMeta
			m.Annotations[AnnotationLegacyApplied] = ""
		}, Legacy, Revision{}},
		"with our entry and IMPS's annotation, which must go: legacy": {func(m *metav1.PartialObjectMetadata) {
			m.Annotations[AnnotationLegacyApplied] = canary
		}, Legacy, revision},

		"restored, its managedFields cleared: restored": {func(m *metav1.PartialObjectMetadata) { m.ManagedFields = nil }, Restored, revision},
		"restored by another manager: restored": {func(m *metav1.PartialObjectMetadata) {
			m.ManagedFields[0].Manager = "velero"
		}, Restored, revision},
		"restored by a client whose name is ours but that does not apply: restored": {func(m *metav1.PartialObjectMetadata) {
			m.ManagedFields[0].Operation = metav1.ManagedFieldsOperationUpdate
		}, Restored, revision},
		"restored, but with a revision that is none: foreign": {func(m *metav1.PartialObjectMetadata) {
			m.ManagedFields = nil
			m.Annotations[AnnotationRevision] = "7"
		}, Foreign, Revision{}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := delivered(t)
			test.edit(m)
			for i := range m.ManagedFields {
				if f := m.ManagedFields[i].FieldsV1; f != nil {
					require.True(t, json.Valid(f.GetRawBytes()), f.GetRawString())
				}
			}
			e := ExistingOf(m)
			require.Equal(t, test.want, e.Ownership)
			require.Equal(t, test.revision, e.Revision)
			require.Equal(t, types.UID(m.Labels[LabelOwnerUID]), e.OwnerUID)
			require.Equal(t, m.UID, e.UID)
			require.Equal(t, m.ResourceVersion, e.ResourceVersion)
			require.False(t, e.Deleting)
			requireSilent(t, fmt.Sprintf("%v %+v %#v", e, e, e))
		})
	}
}

func TestExistingKeepsWhatDecides(t *testing.T) {
	t.Parallel()
	m := delivered(t)
	m.OwnerReferences = append([]metav1.OwnerReference{refB().OwnerReference()}, m.OwnerReferences...)
	now := metav1.Now()
	m.DeletionTimestamp = &now
	e := ExistingOf(m)
	require.Equal(t, []types.UID{uidA, uidB}, e.OwnerReferences, "sorted")
	require.True(t, e.HasOwner(uidA))
	require.True(t, e.HasOwner(uidB))
	require.False(t, e.HasOwner("other"))
	require.True(t, e.Deleting)
	require.Equal(t, types.UID("secret-uid"), e.UID)
	require.Equal(t, "100", e.ResourceVersion)
	require.Equal(t, uidA, e.OwnerUID)
	require.False(t, ExistingOf(&metav1.PartialObjectMetadata{}).HasOwner(""))
}

func TestExpectationIsMetByWhatWasAppliedAndNotByLess(t *testing.T) {
	t.Parallel()
	setFields := func(m *metav1.PartialObjectMetadata, paths ...fieldpath.Path) {
		m.ManagedFields[0].FieldsV1.SetRawString(fieldsOf(t, paths...))
	}
	without := func(path fieldpath.Path) func(*metav1.PartialObjectMetadata) {
		return func(m *metav1.PartialObjectMetadata) {
			var rest []fieldpath.Path
			for _, p := range appliedPaths(uidA) {
				if !p.Equals(path) {
					rest = append(rest, p)
				}
			}
			require.Len(t, rest, len(appliedPaths(uidA))-1)
			setFields(m, rest...)
		}
	}
	tests := map[string]struct {
		edit func(m *metav1.PartialObjectMetadata)
		want bool
	}{
		"as it was applied": {func(*metav1.PartialObjectMetadata) {}, true},
		"at another resourceVersion and UID": {func(m *metav1.PartialObjectMetadata) {
			m.ResourceVersion, m.UID = "200", "other"
		}, true},
		"with labels and annotations of others": {func(m *metav1.PartialObjectMetadata) {
			m.Labels["users"], m.Annotations["users"] = "x", "y"
			m.ManagedFields = append(m.ManagedFields, entry("kubectl-edit", metav1.ManagedFieldsOperationUpdate, kubectlFields))
		}, true},
		"with an owner reference of somebody else": {func(m *metav1.PartialObjectMetadata) {
			m.OwnerReferences = append(m.OwnerReferences, refB().OwnerReference())
			m.ManagedFields = append(m.ManagedFields, entry("other", metav1.ManagedFieldsOperationUpdate, fieldsOf(t, ownerPath(uidB))))
		}, true},
		"with an owner reference that only we put there": {func(m *metav1.PartialObjectMetadata) {
			m.OwnerReferences = append(m.OwnerReferences, refB().OwnerReference())
			setFields(m, appliedPaths(uidA, uidB)...)
		}, false},
		"with a parent in our fields": {func(m *metav1.PartialObjectMetadata) {
			setFields(m, append(appliedPaths(uidA), fieldpath.MakePathOrDie("metadata", "labels"))...)
		}, true},

		"somebody took the data":         {without(fieldpath.MakePathOrDie("data", corev1.DockerConfigJsonKey)), false},
		"somebody took the type":         {without(fieldpath.MakePathOrDie("type")), false},
		"somebody took a label":          {without(labelPath("l")), false},
		"somebody took the owner label":  {without(labelPath(LabelOwnerUID)), false},
		"somebody took an annotation":    {without(annotationPath("a")), false},
		"somebody took the revision":     {without(annotationPath(AnnotationRevision)), false},
		"somebody took the owner":        {without(ownerPath(uidA)), false},
		"an owner of ours is of another": {func(m *metav1.PartialObjectMetadata) { setFields(m, appliedPaths(uidB)...) }, false},
		"the owner reference is missing": {func(m *metav1.PartialObjectMetadata) { m.OwnerReferences = nil }, false},
		"another resource is the owner":  {func(m *metav1.PartialObjectMetadata) { m.OwnerReferences[0].UID = uidB }, false},
		"the counter is lower":           {func(m *metav1.PartialObjectMetadata) { m.Annotations[AnnotationRevision] = string(uidA) + ".6" }, false},
		"the counter is higher":          {func(m *metav1.PartialObjectMetadata) { m.Annotations[AnnotationRevision] = string(uidA) + ".8" }, false},
		"the revision is of another":     {func(m *metav1.PartialObjectMetadata) { m.Annotations[AnnotationRevision] = string(uidB) + ".7" }, false},
		"the revision is missing":        {func(m *metav1.PartialObjectMetadata) { delete(m.Annotations, AnnotationRevision) }, false},
		"the owner label is of another":  {func(m *metav1.PartialObjectMetadata) { m.Labels[LabelOwnerUID] = string(uidB) }, false},
		"the owner label is missing":     {func(m *metav1.PartialObjectMetadata) { delete(m.Labels, LabelOwnerUID) }, false},
		"IMPS's annotation is there":     {func(m *metav1.PartialObjectMetadata) { m.Annotations[AnnotationLegacyApplied] = "" }, false},
		"managedFields were cleared":     {func(m *metav1.PartialObjectMetadata) { m.ManagedFields = nil }, false},
		"our entry has no fields":        {func(m *metav1.PartialObjectMetadata) { m.ManagedFields[0].FieldsV1 = nil }, false},
		"our entry's fields are no JSON": {func(m *metav1.PartialObjectMetadata) {
			m.ManagedFields[0].FieldsV1.SetRawString("{" + AnnotationRevision)
		}, false},
		"our entry's fields are empty": {func(m *metav1.PartialObjectMetadata) { m.ManagedFields[0].FieldsV1.SetRawString("{}") }, false},
		"the same, by update, not apply": {func(m *metav1.PartialObjectMetadata) {
			m.ManagedFields[0].Operation = metav1.ManagedFieldsOperationUpdate
		}, false},
		"the same, by another's apply":    {func(m *metav1.PartialObjectMetadata) { m.ManagedFields[0].Manager = "kubectl" }, false},
		"our fields stand in two entries": {func(m *metav1.PartialObjectMetadata) { m.ManagedFields = append(m.ManagedFields, ourEntry("{}")) }, false},
	}
	shared, err := NewExpectation(mustTarget(t, refA(), pullSecret(), 7))
	require.NoError(t, err)
	require.Equal(t, uint64(7), shared.Target().Revision().Counter)
	for name, test := range tests {
		m := delivered(t)
		test.edit(m)
		fresh, err := NewExpectation(mustTarget(t, refA(), pullSecret(), 7))
		require.NoError(t, err)
		require.Equal(t, test.want, fresh.Met(ExistingOf(m)), name)
		// Verdicts that are remembered are the same.
		require.Equal(t, test.want, shared.Met(ExistingOf(m)), name)
		require.Equal(t, test.want, shared.Met(ExistingOf(m)), name)
	}
	require.False(t, shared.Met(Existing{}))
}

func TestAnExpectationOfTwoOwnersNeedsBoth(t *testing.T) {
	t.Parallel()
	both, err := mustTarget(t, refA(), pullSecret(), 7).WithOwners([]ResourceRef{refA(), refB()})
	require.NoError(t, err)
	expectation, err := NewExpectation(both)
	require.NoError(t, err)
	require.False(t, expectation.Met(ExistingOf(delivered(t))))

	m := delivered(t)
	m.OwnerReferences = append(m.OwnerReferences, refB().OwnerReference())
	require.False(t, expectation.Met(ExistingOf(m)), "somebody else put it there, who may take it away")
	m.ManagedFields[0].FieldsV1.SetRawString(fieldsOf(t, appliedPaths(uidA, uidB)...))
	require.True(t, expectation.Met(ExistingOf(m)))
}

func TestAnExpectationOfNoTargetIsAnError(t *testing.T) {
	t.Parallel()
	_, err := NewExpectation(Target{})
	require.Error(t, err)
}

// adoption is an AdoptionPatch taken apart.
type adoption struct {
	resourceVersion string
	entries         []metav1.ManagedFieldsEntry
	removes         []string
}

func mustAdopt(t *testing.T, m *metav1.PartialObjectMetadata) adoption {
	t.Helper()
	before, err := json.Marshal(m)
	require.NoError(t, err)
	patch, err := AdoptionPatch(m)
	require.NoError(t, err)
	after, err := json.Marshal(m)
	require.NoError(t, err)
	require.Equal(t, string(before), string(after), "what was read is not changed")
	requireSilent(t, string(patch))

	var a adoption
	var ops []struct {
		Op, Path string
		Value    json.RawMessage
	}
	require.NoError(t, json.Unmarshal(patch, &ops))
	for _, op := range ops {
		switch op.Op + " " + op.Path {
		case "replace /metadata/resourceVersion":
			require.NoError(t, json.Unmarshal(op.Value, &a.resourceVersion))
		case "add /metadata/managedFields":
			require.NoError(t, json.Unmarshal(op.Value, &a.entries))
		default:
			require.Equal(t, "remove", op.Op)
			require.Empty(t, op.Value)
			a.removes = append(a.removes, op.Path)
		}
	}
	require.Equal(t, m.ResourceVersion, a.resourceVersion, "the patch fails where the Secret has changed")
	return a
}

// ours returns the fields of the one entry of our manager.
func (a adoption) ours(t *testing.T) *fieldpath.Set {
	t.Helper()
	var ours *fieldpath.Set
	for i := range a.entries {
		if !isOurEntry(&a.entries[i]) {
			continue
		}
		require.Nil(t, ours, "one entry of ours")
		require.Equal(t, "v1", a.entries[i].APIVersion)
		require.Equal(t, "FieldsV1", a.entries[i].FieldsType)
		require.NotNil(t, a.entries[i].Time)
		ours = &fieldpath.Set{}
		require.NoError(t, ours.FromJSON(a.entries[i].FieldsV1.GetRawReader()))
	}
	require.NotNil(t, ours)
	return ours
}

func setOf(paths ...fieldpath.Path) *fieldpath.Set { return fieldpath.NewSet(paths...) }

func requireSet(t *testing.T, want, got *fieldpath.Set) {
	t.Helper()
	require.True(t, want.Equals(got), "want %s\nhave %s", want, got)
}

func TestAdoptionTurnsWhatIMPSWroteIntoOurs(t *testing.T) {
	t.Parallel()
	const (
		annotation = "/metadata/annotations/banzaicloud.com~1last-applied"
		revision   = "/metadata/annotations/images.banzaicloud.io~1revision"
	)
	withoutRevision := setOf(appliedPaths(uidA)...).Difference(setOf(annotationPath(AnnotationRevision)))
	always := []fieldpath.Path{fieldpath.MakePathOrDie("type"), fieldpath.MakePathOrDie("data", corev1.DockerConfigJsonKey), labelPath(LabelOwnerUID)}
	with := func(more ...fieldpath.Path) *fieldpath.Set { return setOf(append(more, always...)...) }
	kubectl := entry("kubectl-label", metav1.ManagedFieldsOperationUpdate, kubectlFields)

	tests := map[string]struct {
		edit    func(m *metav1.PartialObjectMetadata)
		ours    *fieldpath.Set
		others  []metav1.ManagedFieldsEntry
		removes []string
	}{
		"as IMPS leaves it": {func(*metav1.PartialObjectMetadata) {}, with(ownerPath(uidA)), nil, []string{annotation}},
		"with labels and annotations of the spec": {func(m *metav1.PartialObjectMetadata) {
			m.Labels["team"], m.Annotations["note"] = "x", "y"
			m.ManagedFields[0].FieldsV1.SetRawString(impsFieldsWithMore)
		}, with(ownerPath(uidA), labelPath("team"), annotationPath("note")), nil, []string{annotation}},
		"with a user's entry beside it": {func(m *metav1.PartialObjectMetadata) {
			m.ManagedFields = append([]metav1.ManagedFieldsEntry{kubectl}, m.ManagedFields...)
		}, with(ownerPath(uidA)), []metav1.ManagedFieldsEntry{kubectl}, []string{annotation}},
		"written by two of IMPS's executables": {func(m *metav1.PartialObjectMetadata) {
			m.ManagedFields[0].FieldsV1.SetRawString(impsFieldsWithMore)
			m.ManagedFields = append(m.ManagedFields, entry("imagepullsecrets", metav1.ManagedFieldsOperationUpdate, impsFields))
		}, with(ownerPath(uidA), labelPath("team"), annotationPath("note")), nil, []string{annotation}},
		"with its managedFields cleared": {func(m *metav1.PartialObjectMetadata) { m.ManagedFields = nil }, with(ownerPath(uidA)), nil, []string{annotation}},
		"with an entry without fields": {func(m *metav1.PartialObjectMetadata) {
			m.ManagedFields = []metav1.ManagedFieldsEntry{entry("x", metav1.ManagedFieldsOperationUpdate, "")}
		}, with(ownerPath(uidA)), []metav1.ManagedFieldsEntry{entry("x", metav1.ManagedFieldsOperationUpdate, "")}, []string{annotation}},
		"with two owner references": {func(m *metav1.PartialObjectMetadata) {
			m.OwnerReferences = append(m.OwnerReferences, refB().OwnerReference())
		}, with(ownerPath(uidA), ownerPath(uidB)), nil, []string{annotation}},
		"with an entry of ours, from a migration that was broken off": {func(m *metav1.PartialObjectMetadata) {
			*m = *delivered(t)
			m.Annotations[AnnotationLegacyApplied] = canary
			m.ManagedFields = append(m.ManagedFields, entry("manager", metav1.ManagedFieldsOperationUpdate, impsFields))
		}, withoutRevision, nil, []string{annotation, revision}},
		"restored, its managedFields cleared": {func(m *metav1.PartialObjectMetadata) {
			*m = *delivered(t)
			m.ManagedFields = nil
		}, with(ownerPath(uidA)), nil, []string{revision}},
		"restored by a manager of its own": {func(m *metav1.PartialObjectMetadata) {
			*m = *delivered(t)
			m.ManagedFields = []metav1.ManagedFieldsEntry{kubectl}
		}, with(ownerPath(uidA)), []metav1.ManagedFieldsEntry{kubectl}, []string{revision}},
		"restored without owner references": {func(m *metav1.PartialObjectMetadata) {
			*m = *delivered(t)
			m.ManagedFields, m.OwnerReferences = nil, nil
		}, with(), nil, []string{revision}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := fromIMPS()
			test.edit(m)
			a := mustAdopt(t, m)
			requireSet(t, test.ours, a.ours(t))
			require.Len(t, a.entries, len(test.others)+1)
			require.ElementsMatch(t, test.others, a.entries[:len(test.others)])
			require.Equal(t, test.removes, a.removes)

			raw := a.entries[len(a.entries)-1].FieldsV1.GetRawString()
			require.NotContains(t, raw, "last-applied")
			require.NotContains(t, raw, "revision", "nobody knows who has set it")
			require.NotContains(t, raw, `".":`)
			for _, parent := range []string{"f:data", "f:metadata", "f:labels", "f:annotations", "f:ownerReferences"} {
				require.NotContains(t, raw, `"`+parent+`":{}`, "a parent would make the next apply remove what is a user's")
			}

			// Then it is ours.
			adopted := m.DeepCopy()
			adopted.ManagedFields = a.entries
			delete(adopted.Annotations, AnnotationLegacyApplied)
			delete(adopted.Annotations, AnnotationRevision)
			require.Equal(t, Ours, ExistingOf(adopted).Ownership)
			require.Zero(t, ExistingOf(adopted).Revision)
		})
	}
}

func TestAdoptionRefusesManagedFieldsThatItCannotRead(t *testing.T) {
	t.Parallel()
	m := fromIMPS()
	m.ManagedFields = append(m.ManagedFields, entry("other", metav1.ManagedFieldsOperationUpdate, `{"x:`+canary+`":1`))
	_, err := AdoptionPatch(m)
	require.ErrorContains(t, err, "other")
	requireSilent(t, err.Error())
}
