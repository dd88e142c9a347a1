{{/*
Names are fixed, see values.yaml. Labels of an object; the argument is {"root": $, "component": "agent"}.
*/}}
{{- define "imps-node.labels" -}}
{{ include "imps-node.podLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{/* Labels of a pod: no version among them, so that a new chart with the same pods restarts none. */}}
{{- define "imps-node.podLabels" -}}
{{ include "imps-node.selectorLabels" . }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/part-of: imps
{{- end }}

{{/* Labels that select pods. A workload's selector cannot be changed later: nothing else may come in here. */}}
{{- define "imps-node.selectorLabels" -}}
app.kubernetes.io/name: imps-node
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "imps-node.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The line that pins a rule to the target Secrets' names; nothing where any name is allowed. */}}
{{- define "imps-node.targetResourceNames" -}}
{{- if not (has "*" .Values.targetSecretNames) -}}
resourceNames: {{ toJson .Values.targetSecretNames }}
{{- end -}}
{{- end }}

{{/* What would render, and then not work. */}}
{{- define "imps-node.validate" -}}
{{- if eq .Values.renderedNamespace .Release.Namespace -}}
{{- fail "renderedNamespace must not be the release's namespace: agents read every Secret in renderedNamespace" -}}
{{- end -}}
{{- if has .Values.renderedNamespace .Values.sourceNamespaces -}}
{{- fail "renderedNamespace must not be one of sourceNamespaces: agents read every Secret in renderedNamespace" -}}
{{- end -}}
{{- end }}

{{/* Flags that both duties have; the argument is the root. */}}
{{- define "imps-node.flags" -}}
- --rendered-namespace={{ .Values.renderedNamespace }}
- --target-secret-names={{ join "," .Values.targetSecretNames }}
{{- with .Values.excludedNamespaces }}
- --excluded-namespaces={{ join "," . }}
{{- end }}
{{- with .Values.log.level }}
- --log-level={{ . }}
{{- end }}
{{- with .Values.log.format }}
- --log-format={{ . }}
{{- end }}
{{- end }}

{{- define "imps-node.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* What the two containers have in common; the argument is the root. */}}
{{- define "imps-node.container" -}}
image: {{ include "imps-node.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
env:
  - name: NODE_NAME
    valueFrom:
      fieldRef:
        fieldPath: spec.nodeName
  - name: POD_NAMESPACE
    valueFrom:
      fieldRef:
        fieldPath: metadata.namespace
  {{- with .Values.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - name: health
    containerPort: 9465
livenessProbe:
  httpGet:
    path: /healthz
    port: health
  periodSeconds: 20
  timeoutSeconds: 5
readinessProbe:
  httpGet:
    path: /readyz
    port: health
  periodSeconds: 10
  timeoutSeconds: 5
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
volumeMounts:
  - name: token
    mountPath: /var/run/secrets/kubernetes.io/serviceaccount
    readOnly: true
{{- end }}

{{/* The token that automounting would give, but for ten minutes: a copy of it is soon worth nothing. */}}
{{- define "imps-node.volumes" -}}
- name: token
  projected:
    sources:
      - serviceAccountToken:
          path: token
          expirationSeconds: 600
      - configMap:
          name: kube-root-ca.crt
          items:
            - key: ca.crt
              path: ca.crt
      - downwardAPI:
          items:
            - path: namespace
              fieldRef:
                fieldPath: metadata.namespace
{{- end }}

{{- define "imps-node.nodeSelector" -}}
{{ toYaml (merge (dict "kubernetes.io/os" "linux") .) }}
{{- end }}
