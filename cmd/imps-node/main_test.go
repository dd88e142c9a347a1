package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// execute runs the program with an environment, and returns its exit code and what it printed.
func execute(t *testing.T, environment map[string]string, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	code = run(t.Context(), args, func(name string) string { return environment[name] }, strings.NewReader(stdin), &out, &errOut)
	return code, out.String(), errOut.String()
}

func TestErrorsAreOneLineAndExitCodeOne(t *testing.T) {
	tests := map[string]struct {
		args        []string
		environment map[string]string
		want        string
	}{
		"a command that is not there": {
			args: []string{"walk"},
			want: `imps-node: unknown command "walk"; see imps-node --help`,
		},
		"an argument where there is none": {
			args: []string{"run", "fast"},
			want: `imps-node: imps-node run takes no arguments, and "fast" is one; see imps-node run --help`,
		},
		"a flag that is not there": {
			args: []string{"run", "--fast"},
			want: "imps-node: unknown flag: --fast; see imps-node run --help",
		},
		"two flags that are wrong": {
			args: []string{"run", "--duties=dance", "--health-addr=here"},
			want: `imps-node: --duties: "dance" is not a duty: use node, cluster, or node,cluster; ` +
				`--health-addr: "here" is not an address: use host:port, :port, or 0 for none; see imps-node run --help`,
		},
		"an environment variable that is wrong": {
			args: []string{"run"}, environment: map[string]string{"IMPS_KUBE_API_QPS": "fast", "NODE_NAME": "a"},
			want: `imps-node: IMPS_KUBE_API_QPS: "fast" is not valid for --kube-api-qps: strconv.ParseFloat: parsing "fast": invalid syntax; see imps-node run --help`,
		},
		"a kubeconfig that is not there": {
			args: []string{"run", "--duties=cluster", "--kubeconfig=nowhere"},
			want: "imps-node: --kubeconfig: stat nowhere: no such file or directory",
		},
		"a plan without a file": {
			args: []string{"plan"},
			want: "imps-node: --filename: give the file with the ImagePullSecrets, or - for the standard input; see imps-node plan --help",
		},
		"a plan of a file that is not there": {
			args: []string{"plan", "-f", "nowhere"},
			want: "imps-node: read nowhere: open nowhere: no such file or directory",
		},
		"an output format that is not there": {
			args: []string{"version", "-o", "table"},
			want: `imps-node: --output: "table" is not known: use text, json; see imps-node version --help`,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := execute(t, test.environment, "", test.args...)
			require.Equal(t, exitError, code)
			require.Empty(t, stdout)
			require.Equal(t, test.want+"\n", stderr)
		})
	}
}

func TestHelpNamesFlagsDefaultsAndVariables(t *testing.T) {
	code, stdout, stderr := execute(t, nil, "", "run", "--help")
	require.Equal(t, exitOK, code)
	require.Empty(t, stderr)
	for _, want := range []string{
		"--target-secret-names list", "[IMPS_TARGET_SECRET_NAMES] (default imps-pull-secret)",
		"[IMPS_NODE_NAME, NODE_NAME]", "[IMPS_NAMESPACE, POD_NAMESPACE]", "Examples:",
	} {
		require.Contains(t, stdout, want)
	}
	code, stdout, _ = execute(t, nil, "")
	require.Equal(t, exitOK, code)
	require.Contains(t, stdout, "Exit codes:")
	require.Contains(t, stdout, "completion ")
}

func TestShellsCompleteValues(t *testing.T) {
	tests := map[string]struct {
		args []string
		want string
	}{
		"duties":      {[]string{"run", "--duties", ""}, "node\ncluster\nnode,cluster\n"},
		"log levels":  {[]string{"run", "--log-level", ""}, "debug\ninfo\nwarn\nerror\n"},
		"log formats": {[]string{"run", "--log-format", ""}, "json\ntext\n"},
		"of plan":     {[]string{"plan", "--output", ""}, "table\njson\n"},
		"of version":  {[]string{"version", "-o", ""}, "text\njson\n"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			code, stdout, _ := execute(t, nil, "", append([]string{"__complete"}, test.args...)...)
			require.Equal(t, exitOK, code)
			require.Equal(t, test.want+":4\n", stdout)
		})
	}
}

func TestVersion(t *testing.T) {
	code, stdout, _ := execute(t, nil, "", "version")
	require.Equal(t, exitOK, code)
	require.Regexp(t, `^imps-node dev, go1\.\S+, \w+/\w+\n$`, stdout)

	code, stdout, _ = execute(t, nil, "", "version", "-o", "json")
	require.Equal(t, exitOK, code)
	require.Regexp(t, `^\{"goVersion":"go1\.[^"]+","platform":"\w+/\w+","version":"dev"\}\n$`, stdout)
}
