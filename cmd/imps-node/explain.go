package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/metadata"

	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/pkg/sync/explain"
)

// explainFlags are the flags of explain pod.
type explainFlags struct {
	kubeconfig         string
	systemNamespace    string
	renderedNamespace  string
	excludedNamespaces list
	output             string
	// namespace and pod are the argument.
	namespace, pod string
}

func newExplainCommand(getenv func(string) string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain",
		Short: "Say why a Pod pulls, or does not",
		Args:  noArguments,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newExplainPodCommand(getenv))
	return cmd
}

func newExplainPodCommand(getenv func(string) string) *cobra.Command {
	f := &explainFlags{}
	cmd := &cobra.Command{
		Use:   "pod NAMESPACE/NAME",
		Short: "Say why a Pod pulls, or does not",
		Long: `pod says for each container's image which ImagePullSecrets have credentials for it, how far these got, the
kubelet's last error, and what to do next. It follows the way that credentials take:

  the ImagePullSecret delivers and selects the namespace; its Secret is there, and current; the Pod names it,
  itself or by its ServiceAccount, which named it before the Pod was made; the registry takes the credentials

or, with spec.target.kubelet, which serves Pods that name no Secret as well:

  the agent of the Pod's node has the credentials in its node cache, for the node or for the Pod's namespace

It only reads, with your own rights, and says what you may not see. Credentials are never shown. All is known
to whoever may get the Pod, its controller, ServiceAccount and Namespace, and Secrets in its namespace, and list
Events and Pods in its namespace, ImagePullSecrets, and Secrets in the namespace of the rendered ones; where
nodes serve their kubelets, get the Pod's Node, and the ConfigMap imps-node-NODE in the namespace of imps.

Exit codes: 0 it is explained, 1 an error.`,
		Example: `  imps-node explain pod shop/web-7d4b9c-x2x5z

  # The causes, for a script
  imps-node explain pod shop/web-7d4b9c-x2x5z -o json | jq -r '.containers[] | "\(.name): \(.cause)"'`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := f.parse(args); err != nil {
				return usageError(cmd, err)
			}
			return nil
		},
		ValidArgsFunction: f.complete,
		RunE:              checked(getenv, f.validate, f.run),
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "`file` that says how to reach the API server; empty: as kubectl does")
	flags.StringVar(&f.systemNamespace, "namespace", "imps-system", "`namespace` that imps runs in")
	flags.StringVar(&f.renderedNamespace, "rendered-namespace", "imps-rendered", "`namespace` of the rendered Secrets")
	flags.Var(&f.excludedNamespaces, "excluded-namespaces", "comma `list` of namespaces that no resource selects, as the coordinator has it")
	bindEnvironment(flags)
	flags.StringVarP(&f.output, "output", "o", outputTable, "`format`: table or json")
	completeValues(cmd, "output", outputTable, outputJSON)
	return cmd
}

// parse takes the Pod from the arguments.
func (f *explainFlags) parse(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("give one Pod as NAMESPACE/NAME, and not %d arguments", len(args))
	}
	var ok bool
	if f.namespace, f.pod, ok = strings.Cut(args[0], "/"); !ok {
		return fmt.Errorf("%q names no Pod: give it as NAMESPACE/NAME", args[0])
	}
	for _, problem := range [][]string{validation.IsDNS1123Label(f.namespace), validation.IsDNS1123Subdomain(f.pod)} {
		if len(problem) > 0 {
			return fmt.Errorf("%q names no Pod: give it as NAMESPACE/NAME: %s", args[0], problem[0])
		}
	}
	return nil
}

func (f *explainFlags) validate() error {
	_, err := impsync.ParseExclusion(f.excludedNamespaces)
	if err != nil {
		err = fmt.Errorf("--excluded-namespaces: %w", err)
	}
	return errors.Join(err, nameValid("namespace", f.systemNamespace, validation.IsDNS1123Label),
		nameValid("rendered-namespace", f.renderedNamespace, validation.IsDNS1123Label), oneOf("output", f.output, outputTable, outputJSON))
}

func (f *explainFlags) run(cmd *cobra.Command) error {
	client, err := personClient(f.kubeconfig, planQPS, "explain")
	if err != nil {
		return err
	}
	result, err := explain.Pod(cmd.Context(), explain.Config{
		Client: client, Namespace: f.systemNamespace, RenderedNamespace: f.renderedNamespace, Excluded: impsync.Exclusion(f.excludedNamespaces),
	}, f.namespace, f.pod)
	if err != nil {
		return err
	}
	if f.output == outputJSON {
		return writeJSON(cmd.OutOrStdout(), result)
	}
	return writeExplanation(cmd.OutOrStdout(), result)
}

// complete lists Pods for a shell.
func (f *explainFlags) complete(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	client, err := personClient(f.kubeconfig, planQPS, "completion")
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	pods, err := metadata.NewForConfig(client)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	// Namespaces first, then the Pods of one.
	resource, end, directive := schema.GroupVersionResource{Version: "v1", Resource: "pods"}, "", cobra.ShellCompDirectiveNoFileComp
	namespace, _, chosen := strings.Cut(begun, "/")
	if !chosen {
		resource, namespace, end, directive = impsync.NamespaceResource, metav1.NamespaceAll, "/", directive|cobra.ShellCompDirectiveNoSpace
	}
	const most = 5000 // more help nobody
	found, err := pods.Resource(resource).Namespace(namespace).List(cmd.Context(), metav1.ListOptions{Limit: most})
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for i := range found.Items {
		name := found.Items[i].Name + end
		if chosen {
			name = namespace + "/" + name
		}
		if strings.HasPrefix(name, begun) {
			names = append(names, name)
		}
	}
	return names, directive
}

func writeExplanation(w io.Writer, result explain.Result) error {
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	printRow(table, fmt.Sprintf("Pod %s/%s, on node %s, ServiceAccount %s", result.Namespace, result.Pod, cmp.Or(result.Node, "-"), result.ServiceAccount))
	section(table, len(result.Containers), "CONTAINER", "IMAGE", "STATE", "CAUSE")
	for _, c := range result.Containers {
		printRow(table, c.Name, c.Image, c.State, string(c.Cause))
	}
	for _, c := range result.Containers {
		printRow(table)
		// No tabs: sentences are no columns.
		printRow(table, c.Name+": "+c.Why)
		printRow(table, "  next: "+c.Next)
		if c.Error != "" {
			said := "  the kubelet says"
			if c.ErrorTime != nil {
				said += ", at " + c.ErrorTime.UTC().Format(time.RFC3339)
			}
			printRow(table, said+": "+c.Error)
		}
		section(table, len(c.Resources), "  IMAGEPULLSECRET", "HOLDS", "SELECTED", "SECRET", "STATE", "POD NAMES IT", "SERVICEACCOUNT NAMES IT", "CAUSE")
		for _, r := range c.Resources {
			selected, account := string(r.Selected), string(r.AccountNames)
			if len(r.SelectedBy) > 0 {
				selected = strings.Join(r.SelectedBy, ",")
			}
			if r.AttachedAt != nil {
				account = "since " + r.AttachedAt.UTC().Format(time.RFC3339)
			}
			names := "no"
			if r.PodNames {
				names = "yes"
			}
			printRow(table, "  "+r.Name, string(r.Holds), selected, r.Secret, string(r.SecretState), names, account, string(r.Cause))
		}
		for _, r := range c.Resources {
			if r.Kubelet != nil {
				printRow(table, fmt.Sprintf("  %s, to the kubelet, scope %s: %s: %s", r.Name, r.Kubelet.Scope, r.Kubelet.Served, r.Kubelet.Why))
			}
		}
	}
	section(table, len(result.Unknown), "UNKNOWN")
	for _, text := range result.Unknown {
		printRow(table, text)
	}
	return table.Flush()
}
