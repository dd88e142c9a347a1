package sync

import (
	"encoding/json"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
)

// selectors are the two selectors of spec.target.
type selectors struct {
	Namespaces v1alpha1.NamespaceSelector `json:"namespaces"`
	Pods       v1alpha1.PodSelector       `json:"namespacesWithPods"`
}

func mustCompile(t *testing.T, text string) *Selection {
	t.Helper()
	s := fromYAML[selectors](t, text)
	selection, skipped, err := CompileSelection(s.Namespaces, s.Pods)
	require.NoError(t, err)
	require.Empty(t, skipped)
	return selection
}

func TestSelectsByRule(t *testing.T) {
	t.Parallel()
	const longURL = "https://registry.example.com:5000/a/very/long/path?with=a&query=that+is+longer+than+sixty-three+characters"
	type namespace struct {
		name                string
		labels, annotations map[string]string
	}
	a := namespace{name: "a", labels: map[string]string{"team": "red", "env": "prod"}, annotations: map[string]string{"team": "red", "note": longURL}}
	b := namespace{name: "b", labels: map[string]string{"team": "blue", "env": "prod"}, annotations: map[string]string{"team": "blue", "note": "two words"}}
	bare := namespace{name: "bare"}
	all := []namespace{a, b, bare}

	tests := map[string]struct {
		selectors string
		want      []string
	}{
		"no selectors at all select nothing (K1)":    {`{}`, nil},
		"empty lists select nothing (K3)":            {`namespaces: {names: [], labels: [], annotations: []}`, nil},
		"an empty label entry selects all (K3)":      {`namespaces: {labels: [{}]}`, []string{"a", "b", "bare"}},
		"an empty annotation entry selects all (K3)": {`namespaces: {annotations: [{}]}`, []string{"a", "b", "bare"}},
		"an entry with empty parts selects all (K3)": {
			`namespaces: {labels: [{matchLabels: {}, matchExpressions: []}]}`, []string{"a", "b", "bare"},
		},
		"an annotation entry with empty parts selects all (K3)": {
			`namespaces: {annotations: [{matchAnnotations: {}, matchExpressions: []}]}`, []string{"a", "b", "bare"},
		},
		"Pod rules select nothing by themselves": {`namespacesWithPods: {labels: [{}], annotations: [{}]}`, nil},

		"a name selects its namespace and no other":      {`namespaces: {names: [a]}`, []string{"a"}},
		"names of absent namespaces are no matter (K7)":  {`namespaces: {names: [a, absent]}`, []string{"a"}},
		"a name is no prefix, no glob and is given once": {`namespaces: {names: ["b*", "ba", "", "*"]}`, nil},
		"a name that is listed twice":                    {`namespaces: {names: [b, b]}`, []string{"b"}},

		"all of an entry's matchLabels must match (K2)": {`namespaces: {labels: [{matchLabels: {team: red, env: prod}}]}`, []string{"a"}},
		"a label must be there with that very value":    {`namespaces: {labels: [{matchLabels: {team: ""}}]}`, nil},
		"matchLabels and matchExpressions must both match (K2)": {
			`namespaces: {labels: [{matchLabels: {env: prod}, matchExpressions: [{key: team, operator: NotIn, values: [red]}]}]}`, []string{"b"},
		},
		"all matchExpressions must match (K2)": {
			`namespaces: {labels: [{matchExpressions: [{key: team, operator: Exists}, {key: team, operator: In, values: [blue, green]}]}]}`, []string{"b"},
		},
		"any entry is enough (K2)": {
			`namespaces: {labels: [{matchLabels: {team: red}}, {matchLabels: {team: blue}}]}`, []string{"a", "b"},
		},
		"any kind of selector is enough (K2)": {
			`namespaces: {names: [bare], labels: [{matchLabels: {team: red}}], annotations: [{matchAnnotations: {team: blue}}]}`, []string{"a", "b", "bare"},
		},
		"labels are not annotations": {`namespaces: {labels: [{matchExpressions: [{key: note, operator: Exists}]}]}`, nil},
		"annotations are not labels": {`namespaces: {annotations: [{matchExpressions: [{key: env, operator: Exists}]}]}`, nil},

		"label NotIn matches without the key (K4)": {
			`namespaces: {labels: [{matchExpressions: [{key: team, operator: NotIn, values: [red]}]}]}`, []string{"b", "bare"},
		},
		"label DoesNotExist matches without the key (K4)": {
			`namespaces: {labels: [{matchExpressions: [{key: team, operator: DoesNotExist}]}]}`, []string{"bare"},
		},
		"label DoesNotExist beside empty values (K1)": {
			`namespaces: {labels: [{matchExpressions: [{key: team, operator: DoesNotExist, values: []}]}]}`, []string{"bare"},
		},
		"all but those that opted out (K4)": {
			`namespaces: {labels: [{matchExpressions: [{key: ignore-imps, operator: DoesNotExist}]}]}`, []string{"a", "b", "bare"},
		},
		"annotation NotIn matches without the key (K4)": {
			`namespaces: {annotations: [{matchExpressions: [{key: team, operator: NotIn, values: [red]}]}]}`, []string{"b", "bare"},
		},
		"annotation DoesNotExist matches without the key (K4)": {
			`namespaces: {annotations: [{matchExpressions: [{key: team, operator: DoesNotExist, values: []}]}]}`, []string{"bare"},
		},
		"annotation In needs the key": {
			`namespaces: {annotations: [{matchExpressions: [{key: absent, operator: In, values: [""]}]}]}`, nil,
		},
		"annotation Exists": {`namespaces: {annotations: [{matchExpressions: [{key: note, operator: Exists}]}]}`, []string{"a", "b"}},
		"all of an annotation entry must match (K2)": {
			`namespaces: {annotations: [{matchAnnotations: {team: red, note: two words}}]}`, nil,
		},
		"annotations match with expressions, both (K2)": {
			`namespaces: {annotations: [{matchAnnotations: {note: two words}, matchExpressions: [{key: team, operator: In, values: [red, blue]}]}]}`, []string{"b"},
		},
		"any annotation entry is enough (K2)": {
			`namespaces: {annotations: [{matchAnnotations: {team: red}}, {matchAnnotations: {team: blue}}]}`, []string{"a", "b"},
		},
		"an annotation value with spaces (B24)":              {`namespaces: {annotations: [{matchAnnotations: {note: two words}}]}`, []string{"b"}},
		"an annotation value that is a long URL (B24)":       {`namespaces: {annotations: [{matchAnnotations: {note: "` + longURL + `"}}]}`, []string{"a"}},
		"NotIn with a value that is no label value (B24)":    {`namespaces: {annotations: [{matchExpressions: [{key: note, operator: NotIn, values: ["two words"]}]}]}`, []string{"a", "bare"}},
		"an annotation value is no prefix and no glob (B24)": {`namespaces: {annotations: [{matchAnnotations: {note: "two*"}}, {matchAnnotations: {note: two}}]}`, nil},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			selection := mustCompile(t, test.selectors)
			var selected []string
			for _, n := range all {
				if selection.SelectsByRule(n.name, n.labels, n.annotations) {
					selected = append(selected, n.name)
				}
			}
			require.Equal(t, test.want, selected)
		})
	}
}

func TestMatchesPod(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		selectors string
		rules     bool
		want      bool
	}{
		"no Pod rules":                             {`namespaces: {names: [x], labels: [{}], annotations: [{}]}`, false, false},
		"empty lists match no Pod (K3)":            {`namespacesWithPods: {labels: [], annotations: []}`, false, false},
		"an empty label entry matches any (K3)":    {`namespacesWithPods: {labels: [{}]}`, true, true},
		"an empty annotation entry, likewise (K3)": {`namespacesWithPods: {annotations: [{}]}`, true, true},
		"a label":                     {`namespacesWithPods: {labels: [{matchLabels: {app: web}}]}`, true, true},
		"another value":               {`namespacesWithPods: {labels: [{matchLabels: {app: db}}]}`, true, false},
		"all of an entry (K2)":        {`namespacesWithPods: {labels: [{matchLabels: {app: web, tier: x}}]}`, true, false},
		"any entry (K2)":              {`namespacesWithPods: {labels: [{matchLabels: {app: db}}, {matchLabels: {app: web}}]}`, true, true},
		"label or annotation (K2)":    {`namespacesWithPods: {labels: [{matchLabels: {app: db}}], annotations: [{matchAnnotations: {image: "r.io/a b"}}]}`, true, true},
		"DoesNotExist (K4)":           {`namespacesWithPods: {labels: [{matchExpressions: [{key: no-imps, operator: DoesNotExist}]}]}`, true, true},
		"NotIn, the key absent (K4)":  {`namespacesWithPods: {annotations: [{matchExpressions: [{key: no, operator: NotIn, values: [imps]}]}]}`, true, true},
		"NotIn, the value there":      {`namespacesWithPods: {labels: [{matchExpressions: [{key: app, operator: NotIn, values: [web]}]}]}`, true, false},
		"a label is no annotation":    {`namespacesWithPods: {annotations: [{matchAnnotations: {app: web}}]}`, true, false},
		"an annotation is no label":   {`namespacesWithPods: {labels: [{matchExpressions: [{key: image, operator: Exists}]}]}`, true, false},
		"an annotation's URL (B24)":   {`namespacesWithPods: {annotations: [{matchAnnotations: {url: "https://r.io:5000/x?y=z"}}]}`, true, true},
		"an annotation's other value": {`namespacesWithPods: {annotations: [{matchAnnotations: {url: "https://r.io:5000/x"}}]}`, true, false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			selection := mustCompile(t, test.selectors)
			require.Equal(t, test.rules, selection.HasPodRules())
			require.Equal(t, test.want, selection.MatchesPod(
				map[string]string{"app": "web"}, map[string]string{"image": "r.io/a b", "url": "https://r.io:5000/x?y=z"}))
		})
	}
}

func TestASelectionKnowsWhetherItHasRules(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		`{}`: false,
		`namespaces: {names: [], labels: [], annotations: []}`: false,
		`namespaces: {names: [a]}`:                             true,
		`namespaces: {labels: [{}]}`:                           true,
		`namespaces: {annotations: [{}]}`:                      true,
		`namespacesWithPods: {labels: [{}]}`:                   true,
		`namespacesWithPods: {annotations: [{}]}`:              true,
	} {
		require.Equal(t, want, mustCompile(t, text).HasRules(), text)
	}
}

// badEntries are entries of labels or annotations that cannot be evaluated.
var badEntries = map[string]struct {
	entry string
	// labels: bad only as labels, whose values are of a narrower form.
	labels bool
	says   string
}{
	"an unknown operator":          {entry: `{matchExpressions: [{key: team, operator: Foo, values: [x]}]}`, says: "Foo"},
	"an operator in another case":  {entry: `{matchExpressions: [{key: team, operator: exists}]}`, says: "exists"},
	"no operator":                  {entry: `{matchExpressions: [{key: team, operator: ""}]}`, says: `""`},
	"In without values":            {entry: `{matchExpressions: [{key: team, operator: In, values: []}]}`, says: "values"},
	"NotIn without values":         {entry: `{matchExpressions: [{key: team, operator: NotIn}]}`, says: "values"},
	"Exists with values":           {entry: `{matchExpressions: [{key: team, operator: Exists, values: [x]}]}`, says: "values"},
	"DoesNotExist with values":     {entry: `{matchExpressions: [{key: team, operator: DoesNotExist, values: [x]}]}`, says: "values"},
	"one bad beside good parts":    {entry: `{matchExpressions: [{key: team, operator: Exists}, {key: team, operator: Foo}]}`, says: "Foo"},
	"a label value with spaces":    {entry: `{matchLabels: {team: "two words"}}`, labels: true, says: "two words"},
	"a label key that is none":     {entry: `{matchLabels: {"a b": x}}`, labels: true, says: "a b"},
	"a label value that is a path": {entry: `{matchExpressions: [{key: team, operator: In, values: ["a/b"]}]}`, labels: true, says: "a/b"},
}

func TestANamespaceSelectorThatCannotBeEvaluatedIsAnError(t *testing.T) {
	t.Parallel()
	for name, test := range badEntries {
		for _, field := range []string{"labels", "annotations"} {
			if test.labels && field != "labels" {
				continue
			}
			t.Run(name+" in "+field, func(t *testing.T) {
				t.Parallel()
				s := fromYAML[selectors](t, `namespaces: {names: [a], `+field+`: [{}, `+test.entry+`]}`)
				selection, skipped, err := CompileSelection(s.Namespaces, s.Pods)
				require.ErrorContains(t, err, "spec.target.namespaces."+field+"[1]: ")
				require.ErrorContains(t, err, test.says)
				require.Nil(t, selection)
				require.Empty(t, skipped)
			})
		}
	}
}

func TestEveryNamespaceSelectorThatCannotBeEvaluatedIsNamed(t *testing.T) {
	t.Parallel()
	s := fromYAML[selectors](t, `
namespaces:
  labels: [{matchExpressions: [{key: a, operator: Foo}]}, {}, {matchExpressions: [{key: b, operator: Bar}]}]
  annotations: [{matchExpressions: [{key: c, operator: Baz}]}]
namespacesWithPods:
  labels: [{matchExpressions: [{key: d, operator: Qux}]}]
`)
	_, _, err := CompileSelection(s.Namespaces, s.Pods)
	for _, part := range []string{"labels[0]", "Foo", "labels[2]", "Bar", "annotations[0]", "Baz"} {
		require.ErrorContains(t, err, part)
	}
}

func TestAPodSelectorThatCannotBeEvaluatedIsSkippedAndTheOthersCount(t *testing.T) {
	t.Parallel()
	for name, test := range badEntries {
		for _, field := range []string{"labels", "annotations"} {
			if test.labels && field != "labels" {
				continue
			}
			t.Run(name+" in "+field, func(t *testing.T) {
				t.Parallel()
				s := fromYAML[selectors](t, `{namespaces: {names: [a]}, namespacesWithPods: {`+field+`: [`+test.entry+`, {matchExpressions: [{key: good, operator: Exists}]}]}}`)
				selection, skipped, err := CompileSelection(s.Namespaces, s.Pods)
				require.NoError(t, err)
				require.Len(t, skipped, 1)
				require.ErrorContains(t, skipped[0], "spec.target.namespacesWithPods."+field+"[0]: ")
				require.ErrorContains(t, skipped[0], test.says)
				require.True(t, selection.SelectsByRule("a", nil, nil))
				require.True(t, selection.HasPodRules())
				good, bad := map[string]string{"good": ""}, map[string]string{"team": "x"}
				require.True(t, selection.MatchesPod(good, good))
				require.False(t, selection.MatchesPod(bad, bad), "a skipped selector matches nothing")
				require.False(t, selection.MatchesPod(nil, nil), "a skipped selector is not an empty one")
			})
		}
	}
}

func TestWithNothingButSkippedPodSelectorsThereAreNoRules(t *testing.T) {
	t.Parallel()
	s := fromYAML[selectors](t, `namespacesWithPods: {labels: [{matchExpressions: [{key: a, operator: Foo}]}], annotations: [{matchExpressions: [{key: a, operator: Foo}]}]}`)
	selection, skipped, err := CompileSelection(s.Namespaces, s.Pods)
	require.NoError(t, err)
	require.Len(t, skipped, 2)
	require.False(t, selection.HasPodRules())
	require.False(t, selection.HasRules())
}

func TestASelectionDoesNotShareWhatItWasCompiledFrom(t *testing.T) {
	t.Parallel()
	s := fromYAML[selectors](t, `namespaces: {names: [a], labels: [{matchLabels: {team: x}}], annotations: [{matchAnnotations: {team: x}}]}`)
	selection, _, err := CompileSelection(s.Namespaces, s.Pods)
	require.NoError(t, err)
	s.Namespaces.Names[0] = "b"
	s.Namespaces.Labels[0].MatchLabels["team"] = "y"
	s.Namespaces.Annotations[0].MatchAnnotations["team"] = "y"
	team := func(value string) map[string]string { return map[string]string{"team": value} }
	require.True(t, selection.SelectsByRule("a", nil, nil))
	require.False(t, selection.SelectsByRule("b", nil, nil))
	require.True(t, selection.SelectsByRule("c", team("x"), nil))
	require.False(t, selection.SelectsByRule("c", team("y"), nil))
	require.True(t, selection.SelectsByRule("c", nil, team("x")))
	require.False(t, selection.SelectsByRule("c", nil, team("y")))
}

// For everything that a label can be, annotations are matched as labels are: the oracle is
// the label selector of apimachinery, which banzaicloud/imps used for both.
func TestAnnotationsMatchAsLabelsDoWhereBothCanBe(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	keys := []string{"a", "b", "example.com/c", "d.e_f-g"}
	values := []string{"", "x", "y", "1", "A.b_c-d", strings.Repeat("v", 63)}
	operators := []metav1.LabelSelectorOperator{
		metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist, "Foo", "",
	}
	pick := func(from []string) string { return from[random.IntN(len(from))] }
	some := func(limit int) map[string]string {
		m := map[string]string{}
		for range random.IntN(limit + 1) {
			m[pick(keys)] = pick(values)
		}
		return m
	}
	matched, refused := 0, 0
	for range 10_000 {
		annotation := v1alpha1.AnnotationSelector{MatchAnnotations: some(2)}
		label := metav1.LabelSelector{MatchLabels: maps.Clone(annotation.MatchAnnotations)}
		for range random.IntN(3) {
			operator := operators[random.IntN(4)]
			if random.IntN(20) == 0 {
				operator = operators[random.IntN(len(operators))]
			}
			var list []string
			if operator == metav1.LabelSelectorOpIn || operator == metav1.LabelSelectorOpNotIn || random.IntN(20) == 0 {
				for range random.IntN(4) {
					list = append(list, pick(values))
				}
			}
			key := pick(keys)
			annotation.MatchExpressions = append(annotation.MatchExpressions, v1alpha1.AnnotationSelectorRequirement{Key: key, Operator: operator, Values: list})
			label.MatchExpressions = append(label.MatchExpressions, metav1.LabelSelectorRequirement{Key: key, Operator: operator, Values: slices.Clone(list)})
		}
		oracle, wantErr := metav1.LabelSelectorAsSelector(&label)
		matcher, err := compileAnnotation(annotation)
		require.Equal(t, wantErr == nil, err == nil, "%+v: %v, %v", annotation, wantErr, err)
		if err != nil {
			refused++
			continue
		}
		for range 3 {
			object := some(4)
			want := oracle.Matches(labels.Set(object))
			require.Equal(t, want, matcher.matches(object), "%+v of %v", annotation, object)
			if want {
				matched++
			}
		}
	}
	require.Greater(t, matched, 2_500, "the samples say something")
	require.Greater(t, refused, 250, "the samples say something")
}

func FuzzCompileSelection(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, `null`, `{"namespaces":{"names":["a"],"labels":[{}],"annotations":[{}]}}`,
		`{"namespaces":{"labels":[{"matchLabels":{"a":"b"},"matchExpressions":[{"key":"a","operator":"NotIn","values":["c"]}]}]}}`,
		`{"namespaces":{"annotations":[{"matchAnnotations":{"a":"b c"},"matchExpressions":[{"key":"a","operator":"In"}]}]}}`,
		`{"namespacesWithPods":{"labels":[{"matchExpressions":[{"key":"a","operator":"Foo"}]},null],"annotations":[{"matchExpressions":[{"operator":"Exists"}]},null]}}`,
		`{"namespacesWithPods":{"annotations":[{"matchExpressions":[{"key":"a","operator":"DoesNotExist","values":[]}]}]}}`,
	} {
		f.Add([]byte(seed), "a", "b")
	}
	f.Fuzz(func(t *testing.T, raw []byte, key, value string) {
		var s selectors
		if json.Unmarshal(raw, &s) != nil {
			return
		}
		selection, skipped, err := CompileSelection(s.Namespaces, s.Pods)
		if err != nil {
			require.Nil(t, selection)
			require.NotEmpty(t, err.Error())
			return
		}
		entries := len(s.Pods.Labels) + len(s.Pods.Annotations)
		require.LessOrEqual(t, len(skipped), entries)
		require.Equal(t, len(skipped) < entries, selection.HasPodRules())
		object := map[string]string{key: value}
		byRule, byPod := selection.SelectsByRule(key, object, object), selection.MatchesPod(object, object)
		if !selection.HasPodRules() {
			require.False(t, byPod)
		}
		if !selection.HasRules() {
			require.False(t, byRule)
		}
		again, _, err := CompileSelection(s.Namespaces, s.Pods)
		require.NoError(t, err)
		require.Equal(t, byRule, again.SelectsByRule(key, object, object), string(raw))
		require.Equal(t, byPod, again.MatchesPod(object, object))
		for _, name := range s.Namespaces.Names {
			require.True(t, selection.SelectsByRule(name, nil, nil))
		}
	})
}
