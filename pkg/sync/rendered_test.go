package sync

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
)

const (
	uidA = types.UID("0a0a0a0a-0000-4000-8000-00000000000a")
	uidB = types.UID("0b0b0b0b-0000-4000-8000-00000000000b")
)

// config is what a Secret's .dockerconfigjson holds.
const config = `{"auths":{"r.io":{"username":"u","password":"` + canary + `"}}}`

var noon = metav1.NewTime(time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC))

func refA() ResourceRef { return ResourceRef{Name: "a", UID: uidA, CreationTimestamp: noon} }
func refB() ResourceRef { return ResourceRef{Name: "b", UID: uidB, CreationTimestamp: noon} }

func mustTarget(t *testing.T, owner ResourceRef, spec v1alpha1.TargetSecretSpec, counter uint64) Target {
	t.Helper()
	target, err := NewTarget(owner, spec, counter, dockerconfig.NewSensitive(config))
	require.NoError(t, err)
	return target
}

func pullSecret() v1alpha1.TargetSecretSpec {
	return v1alpha1.TargetSecretSpec{Name: "pull", Labels: map[string]string{"l": "1"}, Annotations: map[string]string{"a": "2"}}
}

func mustRendered(t *testing.T) Rendered {
	t.Helper()
	s := fromYAML[selectors](t, `
namespaces: {names: [n], labels: [{matchLabels: {team: red}}], annotations: [{matchAnnotations: {url: "https://r.io/<x> & y"}}]}
namespacesWithPods: {labels: [{}], annotations: [{matchExpressions: [{key: k, operator: DoesNotExist}]}]}
`)
	return Rendered{FormatVersion: 1, Resource: refA(), Namespaces: s.Namespaces, Pods: s.Pods, Rescue: true, Kubelet: v1alpha1.KubeletScopeNode, Target: mustTarget(t, refA(), pullSecret(), 7)}
}

// secret is a Secret as the API server would understand a body.
func secret(t *testing.T, body []byte) *corev1.Secret {
	t.Helper()
	s := &corev1.Secret{}
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.DisallowUnknownFields()
	require.NoError(t, decoder.Decode(s))
	require.False(t, decoder.More())
	return s
}

func TestRevisionIsWrittenAndParsed(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]Revision{
		"u.0":                              {UID: "u"},
		"u.1":                              {UID: "u", Counter: 1},
		string(uidA) + ".42":               {UID: uidA, Counter: 42},
		fmt.Sprintf("u.%d", math.MaxInt64): {UID: "u", Counter: math.MaxInt64},
	} {
		got, err := ParseRevision(text)
		require.NoError(t, err)
		require.Equal(t, want, got)
		require.Equal(t, text, got.String())
	}
}

func TestWhatIsNoRevisionIsRefused(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"empty": "", "a dot": ".", "no UID": ".1", "no counter": "u.", "no dot": "u1", "a sign": "u.+1", "negative": "u.-1",
		"a space": "u. 1", "a fraction": "u.1.0", "hexadecimal": "u.0x1", "an underscore": "u.1_0", "leading zeros, which are another text": "u.01",
		"one that leaves no room to count on": fmt.Sprintf("u.%d", uint64(math.MaxInt64)+1),
	} {
		_, err := ParseRevision(text)
		require.Error(t, err, name)
	}
}

func FuzzParseRevision(f *testing.F) {
	for _, seed := range []string{"", "u.1", "u.01", "u.-1", "u..1", "u.1.1", string(uidA) + ".9223372036854775808"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, err := ParseRevision(text)
		if err != nil {
			require.Zero(t, r)
			return
		}
		require.Equal(t, text, r.String())
		require.NotEmpty(t, r.UID)
		require.Positive(t, r.Counter+1)
	})
}

func TestOfResourcesThatClaimOneTargetTheLesserWins(t *testing.T) {
	t.Parallel()
	at := func(name string, offset time.Duration) ResourceRef {
		return ResourceRef{Name: name, UID: types.UID("uid-" + name), CreationTimestamp: metav1.NewTime(noon.Add(offset))}
	}
	for name, test := range map[string]struct {
		a, b ResourceRef
		want int
	}{
		"the older is lesser, whatever the names": {at("z", -time.Second), at("a", 0), -1},
		"the younger is greater":                  {at("a", time.Second), at("z", 0), 1},
		"at the same time the name decides":       {at("a", 0), at("b", 0), -1},
		"names are compared byte by byte":         {at("b", 0), at("a-longer-name", 0), 1},
		"the same":                                {at("a", 0), at("a", 0), 0},
		"in another zone the time is the same": {
			at("a", 0), ResourceRef{Name: "a", CreationTimestamp: metav1.NewTime(noon.In(time.FixedZone("x", 3600)))}, 0,
		},
	} {
		require.Equal(t, test.want, test.a.Compare(test.b), name)
		require.Equal(t, -test.want, test.b.Compare(test.a), name)
	}
	refs := []ResourceRef{at("b", time.Second), at("c", 0), at("a", time.Second), at("z", -time.Second)}
	slices.SortFunc(refs, ResourceRef.Compare)
	require.Equal(t, []ResourceRef{at("z", -time.Second), at("c", 0), at("a", time.Second), at("b", time.Second)}, refs)
}

func TestTargetIsThePullSecretThatTheResourceAsksFor(t *testing.T) {
	t.Parallel()
	target := mustTarget(t, refA(), pullSecret(), 7)
	require.Equal(t, "pull", target.Name())
	require.Equal(t, Revision{UID: uidA, Counter: 7}, target.Revision())
	require.Equal(t, []types.UID{uidA}, target.Owners())
	require.False(t, target.IsZero())
	require.True(t, Target{}.IsZero())

	require.Equal(t, &corev1.Secret{ // K8
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{
			Name:            "pull",
			Labels:          map[string]string{"l": "1", LabelOwnerUID: string(uidA)},
			Annotations:     map[string]string{"a": "2", AnnotationRevision: string(uidA) + ".7"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "images.banzaicloud.io/v1alpha1", Kind: "ImagePullSecret", Name: "a", UID: uidA}},
		},
		Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(config)},
	}, secret(t, target.Body("", "")))
}

func TestReservedLabelAndAnnotationsWinOverTheSpecs(t *testing.T) {
	t.Parallel()
	spec := v1alpha1.TargetSecretSpec{
		Name:        "pull",
		Labels:      map[string]string{LabelOwnerUID: "somebody-else", "l": "1"},
		Annotations: map[string]string{AnnotationRevision: "other.99", AnnotationLegacyApplied: canary, "a": "2"},
	}
	was := fmt.Sprintf("%#v", spec)
	body := mustTarget(t, refA(), spec, 7).Body("", "")
	s := secret(t, body)
	require.Equal(t, map[string]string{LabelOwnerUID: string(uidA), "l": "1"}, s.Labels)
	require.Equal(t, map[string]string{AnnotationRevision: string(uidA) + ".7", "a": "2"}, s.Annotations)
	require.NotContains(t, string(body), "last-applied")
	require.Equal(t, was, fmt.Sprintf("%#v", spec), "the spec is not changed")
}

func TestATargetWithoutLabelsAndAnnotationsHasTheReservedOnes(t *testing.T) {
	t.Parallel()
	s := secret(t, mustTarget(t, refA(), v1alpha1.TargetSecretSpec{Name: "pull"}, 1).Body("", ""))
	require.Equal(t, map[string]string{LabelOwnerUID: string(uidA)}, s.Labels)
	require.Equal(t, map[string]string{AnnotationRevision: string(uidA) + ".1"}, s.Annotations)
}

func TestBodyWithPreconditionsDiffersInThemOnly(t *testing.T) {
	t.Parallel()
	target := mustTarget(t, refA(), pullSecret(), 7)
	without := target.Body("", "")
	with := target.Body("u-1", "12345")
	conditional := secret(t, with)
	require.Equal(t, "12345", conditional.ResourceVersion)
	require.Equal(t, types.UID("u-1"), conditional.UID)
	conditional.ResourceVersion, conditional.UID = "", ""
	require.Equal(t, secret(t, without), conditional)
	require.Equal(t, string(without), strings.Replace(string(with), `"uid":"u-1","resourceVersion":"12345",`, "", 1))

	require.NotContains(t, string(target.Body("", "5")), `"uid":"",`)
	for i := range without {
		without[i] = 'x'
	}
	require.Equal(t, string(with), string(target.Body("u-1", "12345")), "who gets a body may write to it")
	require.NotEqual(t, string(without), string(target.Body("", "")))
}

func TestSameContent(t *testing.T) {
	t.Parallel()
	target := mustTarget(t, refA(), pullSecret(), 7)
	change := func(change func(*v1alpha1.TargetSecretSpec)) Target {
		spec := pullSecret()
		change(&spec)
		return mustTarget(t, refA(), spec, 7)
	}
	otherConfig, err := NewTarget(refA(), pullSecret(), 7, dockerconfig.NewSensitive(`{"auths":{}}`))
	require.NoError(t, err)
	handedOver, err := target.WithOwners([]ResourceRef{refA(), refB()})
	require.NoError(t, err)
	renamed := refA()
	renamed.Name = "renamed"

	for name, test := range map[string]struct {
		other Target
		want  bool
	}{
		"the same":                       {mustTarget(t, refA(), pullSecret(), 7), true},
		"another counter":                {mustTarget(t, refA(), pullSecret(), 8), true},
		"a counter of another length":    {mustTarget(t, refA(), pullSecret(), 123456), true},
		"other credentials":              {otherConfig, false},
		"another owner":                  {mustTarget(t, refB(), pullSecret(), 7), false},
		"an owner of another name":       {mustTarget(t, renamed, pullSecret(), 7), false},
		"one more owner":                 {handedOver, false},
		"another name":                   {change(func(s *v1alpha1.TargetSecretSpec) { s.Name = "other" }), false},
		"another label":                  {change(func(s *v1alpha1.TargetSecretSpec) { s.Labels["l"] = "x" }), false},
		"one label more":                 {change(func(s *v1alpha1.TargetSecretSpec) { s.Labels["m"] = "x" }), false},
		"one annotation less":            {change(func(s *v1alpha1.TargetSecretSpec) { s.Annotations = nil }), false},
		"labels of the reserved key":     {change(func(s *v1alpha1.TargetSecretSpec) { s.Labels[LabelOwnerUID] = "x" }), true},
		"annotation of the reserved key": {change(func(s *v1alpha1.TargetSecretSpec) { s.Annotations[AnnotationRevision] = "x" }), true},
		"no target":                      {Target{}, false},
	} {
		require.Equal(t, test.want, target.SameContent(test.other), name)
		require.Equal(t, test.want, test.other.SameContent(target), name)
	}
}

func TestALabelThatLooksLikeTheRevisionIsContent(t *testing.T) {
	t.Parallel()
	spec := pullSecret()
	spec.Labels["copy"] = string(uidA) + ".7"
	target := mustTarget(t, refA(), spec, 7)
	require.True(t, target.SameContent(mustTarget(t, refA(), spec, 8)))
	spec.Labels["copy"] = ""
	require.False(t, target.SameContent(mustTarget(t, refA(), spec, 7)))
	require.False(t, target.SameContent(mustTarget(t, refA(), spec, 8)))
}

func TestWithOwners(t *testing.T) {
	t.Parallel()
	target := mustTarget(t, refA(), pullSecret(), 7)
	both, err := target.WithOwners([]ResourceRef{refB(), refA()})
	require.NoError(t, err)
	require.Equal(t, []types.UID{uidA, uidB}, both.Owners(), "sorted")
	require.Equal(t, target.Revision(), both.Revision())
	require.Equal(t, target.Name(), both.Name())

	want := secret(t, target.Body("", ""))
	want.OwnerReferences = []metav1.OwnerReference{refB().OwnerReference(), refA().OwnerReference()}
	require.Equal(t, want, secret(t, both.Body("", "")))
	require.Equal(t, []types.UID{uidA}, target.Owners(), "the target itself is as it was")

	back, err := both.WithOwners([]ResourceRef{refA()})
	require.NoError(t, err)
	require.True(t, back.SameContent(target))
	parsed, err := parseTarget(both.Body("", ""))
	require.NoError(t, err)
	require.Equal(t, both.Owners(), parsed.Owners())

	_, err = Target{}.WithOwners([]ResourceRef{refA()})
	require.Error(t, err)
}

func TestATargetGivesItsCredentialsBack(t *testing.T) {
	t.Parallel()
	got, err := mustTarget(t, refA(), pullSecret(), 7).Config()
	require.NoError(t, err)
	require.Equal(t, config, got.Reveal())
	_, err = Target{}.Config()
	require.Error(t, err)
}

func TestOwnerReferencesNeitherControlNorBlock(t *testing.T) {
	t.Parallel()
	require.Equal(t, metav1.OwnerReference{APIVersion: "images.banzaicloud.io/v1alpha1", Kind: "ImagePullSecret", Name: "a", UID: uidA}, refA().OwnerReference())
	r := &v1alpha1.ImagePullSecret{ObjectMeta: metav1.ObjectMeta{Name: "a", UID: uidA, CreationTimestamp: noon, Namespace: "ignored"}}
	require.Equal(t, refA(), RefOf(r))
}

func TestRenderedIsEncodedAndDecoded(t *testing.T) {
	t.Parallel()
	r := mustRendered(t)
	data, err := EncodeRendered(r)
	require.NoError(t, err)
	require.Equal(t, []string{"formatVersion", "rendered", "target"}, slices.Sorted(maps.Keys(data)))
	require.Equal(t, "1", string(data["formatVersion"]))
	requireSilent(t, string(data["rendered"]))

	got, err := decodeRendered(data, FormatVersions())
	require.NoError(t, err)
	require.True(t, got.Resource.CreationTimestamp.Equal(&r.Resource.CreationTimestamp))
	require.Equal(t, r.Resource.Name, got.Resource.Name)
	require.Equal(t, r.Resource.UID, got.Resource.UID)
	require.True(t, r.SameSelectors(got))
	require.Equal(t, string(r.Target.Body("", "")), string(got.Target.Body("", "")))
	require.Equal(t, r.Target.Name(), got.Target.Name())
	require.Equal(t, r.Target.Revision(), got.Target.Revision())
	require.Equal(t, r.Target.Owners(), got.Target.Owners())
	require.True(t, r.Target.SameContent(got.Target))

	for range 10 { // maps have no order
		again, err := EncodeRendered(mustRendered(t))
		require.NoError(t, err)
		require.Equal(t, data, again)
	}
	again, err := EncodeRendered(got)
	require.NoError(t, err)
	require.Equal(t, data, again)
}

func TestSameSelectors(t *testing.T) {
	t.Parallel()
	rendered := func(text string) Rendered {
		s := fromYAML[selectors](t, text)
		return Rendered{Namespaces: s.Namespaces, Pods: s.Pods}
	}
	a := rendered(`{namespaces: {names: [a]}, namespacesWithPods: {labels: [{}]}}`)
	require.True(t, a.SameSelectors(rendered(`{namespaces: {names: [a], labels: [], annotations: []}, namespacesWithPods: {labels: [{matchLabels: {}}], annotations: []}}`)))
	for _, other := range []string{
		`{}`,
		`{namespaces: {names: [b]}, namespacesWithPods: {labels: [{}]}}`,
		`{namespaces: {names: [a]}, namespacesWithPods: {labels: []}}`,
		`{namespaces: {names: [a]}, namespacesWithPods: {labels: [{}], annotations: [{}]}}`,
		`{namespaces: {names: [a], labels: [{}]}, namespacesWithPods: {labels: [{}]}}`,
	} {
		require.False(t, a.SameSelectors(rendered(other)), other)
	}
}

func TestCredentialsThatFitIntoNoSecretAreAnError(t *testing.T) {
	t.Parallel()
	noise := make([]byte, corev1.MaxSecretSize)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = byte(random.UintN(256))
	}
	encode := func(config []byte) (size int, err error) {
		target, err := NewTarget(refA(), pullSecret(), 1, dockerconfig.NewSensitive(config))
		require.NoError(t, err)
		data, err := EncodeRendered(Rendered{FormatVersion: 1, Resource: refA(), Target: target})
		for key, value := range data {
			size += len(key) + len(value)
		}
		return size, err
	}
	_, err := encode(append([]byte(canary), noise...))
	require.ErrorContains(t, err, "too large")
	require.ErrorContains(t, err, fmt.Sprint(corev1.MaxSecretSize))
	requireSilent(t, err.Error())

	// Whatever is encoded can be decoded.
	spec := pullSecret()
	for _, n := range []int{0, 256 << 10, 700 << 10, 1 << 20} {
		spec.Annotations = map[string]string{"a": strings.Repeat("<", n)}
		target, err := NewTarget(refA(), spec, 1, dockerconfig.NewSensitive(bytes.Repeat([]byte("x"), corev1.MaxSecretSize)))
		require.NoError(t, err)
		data, err := EncodeRendered(Rendered{FormatVersion: 1, Resource: refA(), Target: target})
		if n > 256<<10 { // which is the most that the API takes
			require.ErrorContains(t, err, "too large")
			continue
		}
		require.NoError(t, err)
		_, err = decodeRendered(data, FormatVersions())
		require.NoError(t, err)
	}

	// What any docker config has, and what fits into the Secret of a namespace, fits: it is text, and tokens repeat.
	text := []byte(base64.StdEncoding.EncodeToString(noise))[:corev1.MaxSecretSize-100]
	size, err := encode(text)
	require.NoError(t, err)
	require.LessOrEqual(t, size, corev1.MaxSecretSize)
	size, err = encode(bytes.Repeat(text[:5000], 200))
	require.NoError(t, err)
	require.Less(t, size, 50_000)
}

func TestAnotherFormatVersionIsToldApart(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"", "0", "2", "01", "1 ", "1.0", canary} {
		data, err := EncodeRendered(mustRendered(t))
		require.NoError(t, err)
		data["formatVersion"] = []byte(version)
		_, err = decodeRendered(data, FormatVersions())
		require.ErrorIs(t, err, ErrFormatVersion, version)
		requireSilent(t, err.Error())
	}
	_, err := decodeRendered(nil, FormatVersions())
	require.ErrorIs(t, err, ErrFormatVersion)
}

func TestARenderedFormThatIsNotOursIsRefusedWithoutBeingQuoted(t *testing.T) {
	t.Parallel()
	edit := func(from, to string) func(map[string][]byte) {
		return func(data map[string][]byte) {
			was, err := Expand(data["target"], maxTargetBytes)
			is := strings.Replace(string(was), from, to, 1)
			if err != nil || is == string(was) {
				panic("nothing was changed")
			}
			data["target"] = Compress([]byte(is))
		}
	}
	put := func(key, value string) func(map[string][]byte) {
		return func(data map[string][]byte) { data[key] = []byte(value) }
	}
	revision := `"` + string(uidA) + `.7"`
	for name, spoil := range map[string]func(map[string][]byte){
		"no record":                          func(data map[string][]byte) { delete(data, "rendered") },
		"no target":                          func(data map[string][]byte) { delete(data, "target") },
		"a record that is no JSON":           put("rendered", `{"resource":`+canary),
		"a record of other types":            put("rendered", `{"resource":"`+canary+`"}`),
		"a time that is none":                put("rendered", `{"resource":{"uid":"`+string(uidA)+`","creationTimestamp":"`+canary+`"}}`),
		"a record without a UID":             put("rendered", `{}`),
		"a record of another resource":       put("rendered", `{"resource":{"name":"`+canary+`","uid":"`+canary+`","creationTimestamp":null}}`),
		"a target that is not compressed":    put("target", canary),
		"a target that is no JSON":           put("target", string(Compress([]byte(canary)))),
		"a target that is null":              put("target", string(Compress([]byte(`null`)))),
		"a target that is far too large":     put("target", string(Compress(bytes.Repeat([]byte(" "), maxTargetBytes+1)))),
		"a target with an unknown field":     edit(`"type":`, `"`+canary+`":1,"type":`),
		"a target with another kind":         edit(`"kind":"Secret"`, `"kind":"`+canary+`"`),
		"a target with another version":      edit(`"apiVersion":"v1"`, `"apiVersion":"`+canary+`"`),
		"a target with another type":         edit(`"type":"kubernetes.io/dockerconfigjson"`, `"type":"`+canary+`"`),
		"a target without a name":            edit(`"name":"pull"`, `"name":""`),
		"a target with a namespace":          edit(`"name":"pull"`, `"name":"pull","namespace":"`+canary+`"`),
		"a target with data that is no such": edit(`"data":{`, `"data":{"`+canary+`":"%",`),
		"a revision that is none":            edit(revision, `"`+canary+`"`),
		"a revision of another resource":     edit(revision, `"`+canary+`.7"`),
		"an owner label of another one":      edit(`"images.banzaicloud.io/owner-uid":"`+string(uidA)+`"`, `"images.banzaicloud.io/owner-uid":"`+canary+`"`),
		"no owner label":                     edit(`"images.banzaicloud.io/owner-uid":"`+string(uidA)+`",`, ``),
		"white space":                        edit(`{"apiVersion"`, `{ "apiVersion"`),
		"something after the end":            func(data map[string][]byte) { data["target"] = append(data["target"], Compress([]byte(" "+canary))...) },
		"fields in another order":            edit(`"apiVersion":"v1","kind":"Secret"`, `"kind":"Secret","apiVersion":"v1"`),
		"a key in another case":              edit(`"metadata":`, `"Metadata":`),
		"a key twice":                        edit(`"kind":"Secret"`, `"kind":"`+canary+`","kind":"Secret"`),
		"a character written otherwise":      edit(`"name":"pull"`, `"name":"p\u0075ll"`),
		"bytes that are no text":             edit(`"name":"pull"`, "\"name\":\"pull\xff\""),
	} {
		data, err := EncodeRendered(mustRendered(t))
		require.NoError(t, err)
		spoil(data)
		got, err := decodeRendered(data, FormatVersions())
		require.Error(t, err, name)
		require.NotErrorIs(t, err, ErrFormatVersion, name)
		require.True(t, got.Target.IsZero(), name)
		for e := err; e != nil; e = errors.Unwrap(e) {
			requireSilent(t, fmt.Sprintf("%v %+v %#v", e, e, e))
		}
	}
}

func TestOnlyASecretOfTheRightTypeAndNameIsARenderedOne(t *testing.T) {
	t.Parallel()
	data, err := EncodeRendered(mustRendered(t))
	require.NoError(t, err)
	for name, test := range map[string]struct {
		edit func(*corev1.Secret)
		ok   bool
	}{
		"as it is written":             {func(*corev1.Secret) {}, true},
		"of another type":              {func(s *corev1.Secret) { s.Type = canary }, false},
		"a pull Secret with such data": {func(s *corev1.Secret) { s.Type = corev1.SecretTypeDockerConfigJson }, false},
		"of no type":                   {func(s *corev1.Secret) { s.Type = "" }, false},
		"of another name":              {func(s *corev1.Secret) { s.Name = canary }, false},
		"of another resource's name":   {func(s *corev1.Secret) { s.Name = RenderedName(uidB) }, false},
		"of the target's name":         {func(s *corev1.Secret) { s.Name = "pull" }, false},
	} {
		s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: RenderedName(uidA)}, Type: RenderedType, Data: data}
		test.edit(s)
		got, err := DecodeRendered(s, FormatVersions())
		require.Equal(t, test.ok, err == nil, name)
		require.Equal(t, test.ok, !got.Target.IsZero(), name)
		if err != nil {
			requireSilent(t, err.Error())
			require.NotErrorIs(t, err, ErrFormatVersion, name)
		}
	}
	future := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: RenderedName(uidA)}, Type: RenderedType, Data: map[string][]byte{"formatVersion": []byte("2")}}
	_, err = DecodeRendered(future, FormatVersions())
	require.ErrorIs(t, err, ErrFormatVersion)
}

func FuzzDecodeRendered(f *testing.F) {
	seed := func(record, target string) { f.Add([]byte("1"), []byte(record), []byte(target)) }
	ref := ResourceRef{Name: "a", UID: "u", CreationTimestamp: noon}
	target, err := NewTarget(ref, pullSecret(), 7, dockerconfig.NewSensitive(config))
	require.NoError(f, err)
	data, err := EncodeRendered(Rendered{FormatVersion: 1, Resource: ref, Target: target})
	require.NoError(f, err)
	seed(string(data["rendered"]), string(target.Body("", "")))
	seed(`{"resource":{"name":"a","uid":"u","creationTimestamp":null},"namespaces":{"names":["`+canary+`"],"labels":[{}]},"namespacesWithPods":{"annotations":[{"matchExpressions":null}]},"x":1}`, string(target.Body("", "")))
	seed(`{"resource":{"uid":"u"}}`, `{"apiVersion":"v1","kind":"Secret","metadata":{"name":"n","labels":{"images.banzaicloud.io/owner-uid":"u"},"annotations":{"images.banzaicloud.io/revision":"u.1"},"ownerReferences":null},"type":"kubernetes.io/dockerconfigjson","data":null}`)
	seed(`{"resource":{"uid":"u"}}`, `{"apiVersion":"v1","kind":"Secret","metadata":{"name":"`+canary+`","annotations":{"images.banzaicloud.io/revision":"`+canary+`"}},"type":"kubernetes.io/dockerconfigjson"}`)
	seed(``, ``)
	f.Add([]byte("2"), []byte(`{}`), []byte(`{}`))
	f.Fuzz(func(t *testing.T, version, record, raw []byte) {
		data := map[string][]byte{"formatVersion": version, "rendered": record, "target": raw}
		if r, err := decodeRendered(data, FormatVersions()); err != nil {
			require.True(t, r.Target.IsZero())
			requireSilent(t, err.Error())
		}
		data["target"] = Compress(raw)
		r, err := decodeRendered(data, FormatVersions())
		if err != nil {
			require.Zero(t, r.Resource)
			require.True(t, r.Target.IsZero())
			requireSilent(t, err.Error())
			return
		}
		requireSilent(t, fmt.Sprintf("%v %+v %#v", r.Target, r.Target, r.Target))
		require.NotEmpty(t, r.Target.Name())
		require.Equal(t, r.Resource.UID, r.Target.Revision().UID)
		require.True(t, json.Valid(r.Target.Body("u", "1")))
		require.True(t, bytes.HasPrefix(r.Target.Body("", ""), []byte(bodyHead)))
		if year := r.Resource.CreationTimestamp.UTC().Year(); year < 1 || year > 9999 {
			return // no API server writes that, and RFC 3339 cannot
		}
		encoded, err := EncodeRendered(r)
		if err != nil {
			require.ErrorContains(t, err, "too large")
			return
		}
		body, err := Expand(encoded["target"], maxTargetBytes)
		require.NoError(t, err)
		require.Equal(t, string(raw), string(body), "the target is what was read, byte for byte")
		again, err := decodeRendered(encoded, FormatVersions())
		require.NoError(t, err)
		require.True(t, again.SameSelectors(r))
		require.True(t, again.Target.SameContent(r.Target))
		twice, err := EncodeRendered(again)
		require.NoError(t, err)
		require.Equal(t, encoded, twice)
		_, err = NewExpectation(r.Target)
		require.NoError(t, err)
	})
}

func TestNeitherTargetNorRenderedPrintsCredentials(t *testing.T) {
	t.Parallel()
	r := mustRendered(t)
	expectation, err := NewExpectation(r.Target)
	require.NoError(t, err)
	type wrapped struct {
		inner  Target
		Outer  *Rendered
		List   []Rendered
		ByName map[string]*Target
	}
	w := wrapped{inner: r.Target, Outer: &r, List: []Rendered{r}, ByName: map[string]*Target{"x": &r.Target}}
	for _, value := range []any{r, &r, r.Target, &r.Target, r.Target.body, expectation, *expectation, w, &w} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			requireSilent(t, fmt.Sprintf(verb, value))
		}
		var logged bytes.Buffer
		slog.New(slog.NewJSONHandler(&logged, nil)).Info("x", "value", value)
		slog.New(slog.NewTextHandler(&logged, nil)).Info("x", "value", value)
		requireSilent(t, logged.String())
		raw, err := json.Marshal(value)
		if err == nil {
			requireSilent(t, string(raw))
		}
	}
	// The sample would show it.
	require.Contains(t, string(r.Target.Body("", "")), base64.StdEncoding.EncodeToString([]byte(config)))
}
