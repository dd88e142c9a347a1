package main

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/types"
)

func TestRefreshFlags(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		args []string
		err  string
	}{
		"no source":                  {[]string{"--target-secret=a.b"}, "--source-secret: give at least one, as namespace.name"},
		"no target":                  {[]string{"--source-secret=a.b"}, "--target-secret: give exactly one, as namespace.name"},
		"two targets":                {[]string{"--source-secret=a.b", "--target-secret=a.c", "--target-secret=a.d"}, "--target-secret: give exactly one"},
		"the target is a source":     {[]string{"--source-secret=a.b", "--target-secret=a.b"}, "--target-secret: it must not be one of the sources"},
		"a name without a namespace": {[]string{"--source-secret=ab"}, `"ab" is not the name of a Secret: use namespace.name`},
		"a namespace that is none":   {[]string{"--source-secret=A.b"}, `"A.b" is not the name of a Secret`},
		"a name that is none":        {[]string{"--source-secret=a.b_c"}, `"a.b_c" is not the name of a Secret`},
		"nothing":                    {[]string{"--source-secret="}, `"" is not the name of a Secret`},
		"a level that is none":       {[]string{"--source-secret=a.b", "--target-secret=a.c", "--log.level=loud"}, `--log-level: "loud" is not known`},
		"an address that is none":    {[]string{"--source-secret=a.b", "--target-secret=a.c", "--metrics-addr=x"}, "--metrics-addr"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := newRootCommand(func(string) string { return "" })
			var out bytes.Buffer
			cmd.SetOut(&out)
			cmd.SetErr(&out)
			cmd.SetArgs(append([]string{"refresh"}, test.args...))
			require.ErrorContains(t, cmd.Execute(), test.err)
		})
	}
}

// The name of a Secret may have dots, and names come in the order in which they were given.
func TestNamesOfSecrets(t *testing.T) {
	t.Parallel()
	var names secretNames
	require.NoError(t, names.Set("team-a.my.ecr"))
	require.NoError(t, names.Set("b.two, c.three"))
	require.Equal(t, secretNames{{Namespace: "team-a", Name: "my.ecr"}, {Namespace: "b", Name: "two"}, {Namespace: "c", Name: "three"}}, names)
	require.Equal(t, "team-a.my.ecr,b.two,c.three", names.String())
	require.Equal(t, types.NamespacedName{Namespace: "team-a", Name: "my.ecr"}, names[0])
}

func TestSessionNames(t *testing.T) {
	t.Parallel()
	require.Equal(t, "imps-coordinator-0", sessionName("coordinator-0"))
	require.Len(t, sessionName("a-name-that-is-much-longer-than-what-aws-allows-for-the-name-of-a-session"), 64)
}
